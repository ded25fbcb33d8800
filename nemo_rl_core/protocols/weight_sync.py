"""Contract of a weight sync: moves weights from the trainer to the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from attrs import frozen

if TYPE_CHECKING:
    from nemo_rl_core.protocols.generation_backend import GenerationBackend
    from nemo_rl_core.protocols.launcher import WorkerGroup

__all__ = ["SyncReport", "WeightSync"]


@frozen(kw_only=True)
class SyncReport:
    """What one refit did."""

    version: int
    num_tensors: int
    num_bytes: int
    """Bytes copied; 0 when the engine shares the trainer's tensors."""
    seconds: float
    fingerprint: str
    """Equal for trainer and engine, which were compared; may be empty where that is switched off."""
    num_bytes_sent: int | None = None
    """Bytes that left the trainer's process for one engine, where that is not `num_bytes` (a delta)."""


@runtime_checkable
class WeightSync(Protocol):
    """Moves weights. A component of group `nemo_rl.weight_syncs`.

    Attributes:
        config_class: attrs class of `weight_sync.options` for this component.
        placements: Where an engine may live that it can reach: "driver" (this process) and "workers" (processes of
            their own: then `engine` is an `EngineWorkers`). May be left out: then only "driver".
    """

    config_class: ClassVar[type]

    def sync(
        self, trainer: WorkerGroup, engine: GenerationBackend, *, version: int, share: bool, timeout_s: float
    ) -> SyncReport:
        """Bring the engine to the trainer's weights.

        Args:
            trainer: The policy's workers.
            engine: The generation backend.
            version: Stamp for what is sampled from now on.
            share: The engine may alias the trainer's tensors (same process, no step while it samples).
            timeout_s: Deadline of the whole refit.

        Raises:
            DeadlineExceeded: Names the side that was waited for.
            InvariantViolation: The fingerprints differ after the sync.
        """
        ...
