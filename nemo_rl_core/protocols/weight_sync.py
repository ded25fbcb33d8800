"""Contract of a weight sync: transfers weights from the trainer to the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from attrs import frozen

if TYPE_CHECKING:
    from nemo_rl_core.protocols.generation_backend import GenerationBackend
    from nemo_rl_core.protocols.launcher import WorkerGroup

__all__ = ["SyncReport", "WeightSync"]


@frozen(kw_only=True)
class SyncReport:
    """Report on one refit."""

    version: int
    num_tensors: int
    num_bytes: int
    """Bytes copied; 0 when the engine shares the trainer's tensors."""
    seconds: float
    fingerprint: str
    """Fingerprint of the weights, equal for trainer and engine; may be empty if the comparison is switched off."""
    num_bytes_sent: int | None = None
    """Bytes that left the trainer's process for one engine, if that is not `num_bytes`, as for a delta."""


@runtime_checkable
class WeightSync(Protocol):
    """Transfers weights to the engine. A component of group `nemo_rl.weight_syncs`.

    Attributes:
        config_class: attrs class of `weight_sync.options` for this component.
        placements: Places of engines that it can reach: "driver" (this process) and "workers" (separate processes;
            `engine` is then an `EngineWorkers`). Optional: without it, only "driver".
    """

    config_class: ClassVar[type]

    def sync(
        self, trainer: WorkerGroup, engine: GenerationBackend, *, version: int, share: bool, timeout_s: float
    ) -> SyncReport:
        """Load the trainer's weights into the engine.

        Args:
            trainer: The policy's workers.
            engine: The generation backend.
            version: Version that later completions carry.
            share: Whether the engine may alias the trainer's tensors (same process, no step while it samples).
            timeout_s: Deadline of the whole refit.

        Raises:
            DeadlineExceeded: The refit took too long; the message names the side that was waited for.
            InvariantViolation: The fingerprints differ after the sync.
        """
        ...
