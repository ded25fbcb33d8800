"""Weight sync from actor to actor: the tensors pass through Ray's object store and never through the driver."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_rl_core.errors import DeadlineExceeded, InvariantViolation
from nemo_rl_core.infra.weight_sync import InProcessSync, InProcessSyncConfig
from nemo_rl_core.protocols.weight_sync import SyncReport
from nemo_rl_plugins_ray.config import ObjectStoreSyncConfig
from nemo_rl_plugins_ray.engine import RemoteEngine
from nemo_rl_plugins_ray.group import Answers, RayWorkerGroup

if TYPE_CHECKING:
    from nemo_rl_core.protocols.generation_backend import GenerationBackend
    from nemo_rl_core.protocols.launcher import WorkerGroup

__all__ = ["ObjectStoreSync"]


class ObjectStoreSync:
    """Moves weights from the trainer's actors to the engines' actors.

    Rank 0 of the trainer writes chunks of full tensors, in the engine's dtype, into the object store of its machine;
    the engines read them there, or Ray copies them to their machine. While an engine loads a chunk the next one is
    written. The driver holds references only.

    Where trainer or engine is not in actors (the same configuration on another launcher) it does what the core's
    in-process sync does.

    Args:
        config: Options; None takes the defaults.
    """

    config_class: ClassVar[type] = ObjectStoreSyncConfig

    def __init__(self, config: ObjectStoreSyncConfig | None = None) -> None:
        self.config = config or ObjectStoreSyncConfig()

    def sync(
        self, trainer: WorkerGroup, engine: GenerationBackend, *, version: int, share: bool, timeout_s: float
    ) -> SyncReport:
        """Bring the engines to the trainer's weights.

        Args:
            trainer: The policy's workers.
            engine: The generation backend.
            version: Stamp for what is sampled from now on.
            share: The engine may alias the trainer's tensors; only between a trainer and an engine in this process.
            timeout_s: Deadline of the whole refit.

        Raises:
            DeadlineExceeded: Names the side that was waited for.
            WorkerDied: One side's actor ended.
            InvariantViolation: The fingerprints differ after the sync.
        """
        if not isinstance(trainer, RayWorkerGroup) or not isinstance(engine, RemoteEngine):
            plain = InProcessSync(InProcessSyncConfig(check_fingerprint=self.config.check_fingerprint))
            return plain.sync(trainer, engine, version=version, share=share, timeout_s=timeout_s)
        started = time.perf_counter()
        source = _Chunks(trainer, engine.dtype, self.config.chunk_mib * 2**20, version=version, timeout_s=timeout_s)
        engine.load(version, iter(source), timeout_s=timeout_s)
        digest = str(source.facts["fingerprint"])
        if self.config.check_fingerprint:
            _compare(digest, engine.fingerprint(), version, source.facts["num_tensors"])
        return SyncReport(
            version=version,
            num_tensors=source.facts["num_tensors"],
            num_bytes=source.facts["num_bytes"],
            seconds=time.perf_counter() - started,
            fingerprint=digest,
        )


class _Chunks:
    """References to the chunks of a trainer's weights, one ahead of the engine."""

    def __init__(
        self, trainer: RayWorkerGroup, dtype: Any, chunk_bytes: int, *, version: int, timeout_s: float
    ) -> None:
        self.facts: dict[str, Any] = {"num_tensors": 0}
        self._trainer = trainer
        self._dtype = dtype
        self._chunk_bytes = chunk_bytes
        self._version = version
        self._timeout_s = timeout_s

    def __iter__(self) -> Iterator[Any]:
        trainer, deadline = self._trainer, time.monotonic() + self._timeout_s
        trainer.check_alive()
        method = "export_weights"
        empty = trainer.put(((), {}))
        others = {m.rank: m.actor.drain.remote(method, empty) for m in trainer.members[1:]}
        answered: Answers = {}
        ask = trainer.members[0].actor.export.options(num_returns=2)
        status, chunk = ask.remote(method, self._dtype, self._chunk_bytes)
        while not self.facts.get("last"):
            self.facts = trainer.head(method, status, others, answered, self._left(deadline))
            ready = chunk
            if not self.facts["last"]:
                status, chunk = ask.remote(None, self._dtype, self._chunk_bytes)
            yield ready
            del ready  # let the store free it
        trainer.collect(method, others, self._left(deadline), answered=answered)

    def _left(self, deadline: float) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(
                f"Refit to weight version {self._version} passed its deadline of {self._timeout_s:g} s after "
                f"{self.facts['num_tensors']} tensors, while waiting for the engine. Raise the refit timeout, or look "
                "at the engine's log."
            )
        return left


def _compare(trainer: str, engine: str, version: int, num_tensors: int) -> None:
    if trainer != engine:
        raise InvariantViolation(
            f"After the refit to weight version {version} the engines' weights differ from the trainer's "
            f"({num_tensors} tensors; trainer {trainer}, engine {engine}). An engine lost, mixed up or changed a "
            "tensor: what it would sample is not the policy. Set invariants.check_fingerprint: false only to look for "
            "the cause."
        )
