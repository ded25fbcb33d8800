"""What the weight syncs of this package share, and those whose two sides work at the same time."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from nemo_rl_core.errors import WorkerDied
from nemo_rl_core.infra.engine_workers import EngineWorkers
from nemo_rl_core.infra.place import Place
from nemo_rl_core.infra.weight_transfer import compare_fingerprints
from nemo_rl_core.protocols.generation_backend import GenerationBackend
from nemo_rl_core.protocols.launcher import WorkerGroup
from nemo_rl_core.protocols.weight_sync import SyncReport
from nemo_rl_plugins_weight_syncs.hub import Deadline, call_off
from nemo_rl_plugins_weight_syncs.sides import Sides
from nemo_rl_plugins_weight_syncs.streaming import Received, Sent, Transfer, open_hub, receive, send

__all__ = ["StreamedSync", "WorkerSync", "conclude", "until_all_alive"]


class WorkerSync(ABC):
    """A weight sync that reaches engines in processes of their own. A sub-class says what one attempt is."""

    config_class: ClassVar[type]
    placements: ClassVar[frozenset[str]] = frozenset({"driver", "workers"})

    @abstractmethod
    def _attempt(self, sides: Sides, start: float) -> SyncReport:
        """Move the weights once; `start` is when the refit began, by `time.perf_counter`."""

    def sync(
        self, trainer: WorkerGroup, engine: GenerationBackend, *, version: int, share: bool, timeout_s: float
    ) -> SyncReport:
        """Bring the engines to the trainer's weights; `share` is ignored, engines have copies of their own.

        Args:
            trainer: The policy's workers.
            engine: An engine of this process, or `EngineWorkers`.
            version: Stamp for what is sampled from now on.
            share: Ignored.
            timeout_s: Deadline of the whole refit.

        Raises:
            DeadlineExceeded: Names the side that was waited for.
            InvariantViolation: The fingerprints differ after the sync.
            CheckpointError: It goes through files, and these cannot be written or read.
            ConfigError: The engines are where this sync does not reach.
        """
        start = time.perf_counter()
        deadline = Deadline.after(timeout_s, version)
        return until_all_alive(engine, deadline, lambda: self._attempt(Sides(trainer, engine, deadline), start))


class StreamedSync(WorkerSync):
    """Streams chunks from the trainer's rank 0 to every engine. A sub-class says how they are carried.

    Args:
        config: Options; None takes the defaults.
    """

    def __init__(self, config: Any = None) -> None:
        self.config = config or self.config_class()
        self._session = uuid.uuid4().hex
        self._epoch = 0

    @abstractmethod
    def carriers(self, trainer: Place, engines: list[Place], transfer: Transfer) -> tuple[tuple[Any, ...], ...]:
        """(class of the trainer's carrier, options...), (class of the engines' carrier, options...).

        Each is made with the transfer, the torch device of its own side's `Place`, and the options.

        Raises:
            ConfigError: The trainer and the engines are where this sync cannot reach.
        """

    def _attempt(self, sides: Sides, start: float) -> SyncReport:
        try:
            return self._stream(sides, start)
        except BaseException:
            self._epoch += 1  # nothing that was kept for this one is used again
            raise

    def _stream(self, sides: Sides, start: float) -> SyncReport:
        here, there = sides.places()
        transfer = Transfer(
            session=self._session,
            epoch=self._epoch,
            version=sides.deadline.version,
            timeout_s=sides.deadline.left,
            chunk_bytes=self.config.chunk_bytes,
            dtype=getattr(sides.engine, "dtype", None),
            names=tuple(sides.engine_names),
            fingerprint=self.config.check_fingerprint,
        )
        out, into = self.carriers(here, there, transfer)
        local = all(place.machine == here.machine for place in there)
        rendezvous = sides.trainer(open_hub, (transfer, None if local else here.address))[0]
        arguments = [
            (name, rendezvous, transfer, place.device, *into) for name, place in zip(transfer.names, there, strict=True)
        ]
        try:
            sent, received = sides.both(send, (transfer, here.device, *out), receive, arguments)
        except BaseException as error:
            call_off(rendezvous, error)
            raise
        return conclude(sent[0], received, transfer, seconds=time.perf_counter() - start)


def until_all_alive(engine: Any, deadline: Deadline, attempt: Callable[[], SyncReport]) -> SyncReport:
    """Refit, again if an engine died in the middle of it and was started anew; then tell the engines that it is done.

    Raises:
        WorkerDied: The trainer died, or an engine that is not started again.
    """
    while True:
        links = list(engine.links) if isinstance(engine, EngineWorkers) else []
        try:
            report = attempt()
        except WorkerDied:
            if all(link.lost is None for link in links):
                raise
            engine.wait_alive(deadline.left)  # raises what ended it if it does not come back
            continue
        if isinstance(engine, EngineWorkers):
            engine.refitted(report.version)
        return report


def conclude(sent: Sent, received: list[Received], transfer: Transfer, *, seconds: float) -> SyncReport:
    """Compare both sides and report.

    Raises:
        InvariantViolation: An engine has other weights than were sent.
    """
    for name, one in zip(transfer.names, received, strict=True):
        if one.fingerprint is not None:
            compare_fingerprints(
                sent.fingerprint, one.fingerprint, version=transfer.version, num_tensors=sent.num_tensors, name=name
            )
    return SyncReport(
        version=transfer.version,
        num_tensors=sent.num_tensors,
        num_bytes=sent.num_bytes,
        seconds=seconds,
        fingerprint=sent.fingerprint if transfer.fingerprint else "",
        num_bytes_sent=sent.num_bytes_sent,
    )
