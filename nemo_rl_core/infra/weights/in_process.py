"""Weight sync within this process: the engine aliases the trainer's tensors, or copies them."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from nemo_rl_core.infra.weights.transfer import OutgoingWeights, compare_fingerprints, run_until
from nemo_rl_core.protocols.launcher import items_of_first
from nemo_rl_core.protocols.training_backend import TrainingBackend
from nemo_rl_core.protocols.weight_sync import SyncReport

if TYPE_CHECKING:
    from nemo_rl_core.protocols.generation_backend import GenerationBackend
    from nemo_rl_core.protocols.launcher import WorkerGroup

__all__ = ["InProcessSync", "InProcessSyncConfig"]


@frozen(kw_only=True)
class InProcessSyncConfig:
    """Options of the in-process weight sync."""

    check_fingerprint: bool = True
    """Compare the weights of both sides after each refit."""


class InProcessSync:
    """Moves weights to an engine in this process.

    From a trainer in this process the engine gets the live tensors, and with `share` it may alias them: then
    nothing is copied. From trainers in other processes rank 0 streams the full tensors, one at a time, over
    its pipe.

    Tensors are cast to the engine's `dtype` if it has that attribute, so that the fingerprints of both sides
    are comparable.

    Args:
        config: Options; None takes the defaults.
    """

    config_class: ClassVar[type] = InProcessSyncConfig
    placements: ClassVar[frozenset[str]] = frozenset({"driver"})

    def __init__(self, config: InProcessSyncConfig | None = None) -> None:
        self.config = config or InProcessSyncConfig()

    def sync(
        self, trainer: WorkerGroup, engine: GenerationBackend, *, version: int, share: bool, timeout_s: float
    ) -> SyncReport:
        """Load the trainer's weights into the engine.

        Args:
            trainer: The policy's workers.
            engine: The generation backend, in this process.
            version: Stamp for what is sampled from now on.
            share: The engine may alias the trainer's tensors; honoured if the trainer is in this process.
            timeout_s: Deadline of the whole refit.

        Raises:
            DeadlineExceeded: Names the side that was waited for.
            InvariantViolation: The fingerprints differ after the sync.
        """
        start = time.perf_counter()
        share = share and trainer.local is not None
        source = items_of_first(trainer, TrainingBackend.export_weights, timeout_s=timeout_s)()
        outgoing = OutgoingWeights(source, getattr(engine, "dtype", None))

        def move() -> None:
            with closing(source):  # an engine that raises in the middle leaves trainers that take the next call
                engine.update_weights(version, iter(outgoing), share=share)

        run_until(move, outgoing, version=version, timeout_s=timeout_s)
        digest = outgoing.digest.hexdigest()
        if self.config.check_fingerprint:
            compare_fingerprints(digest, engine.fingerprint(), version=version, num_tensors=outgoing.num_tensors)
        return SyncReport(
            version=version,
            num_tensors=outgoing.num_tensors,
            num_bytes=outgoing.num_cast_bytes if share else outgoing.num_bytes,
            seconds=time.perf_counter() - start,
            fingerprint=digest,
        )
