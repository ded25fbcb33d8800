"""Base classes of this package's weight syncs: any that reaches engine processes, and those that stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from nemo_rl_core.errors import WorkerDied
from nemo_rl_core.infra.engines.workers import EngineWorkers
from nemo_rl_core.infra.weights.transfer import compare_fingerprints
from nemo_rl_core.machine.place import Place
from nemo_rl_core.protocols.generation_backend import GenerationBackend
from nemo_rl_core.protocols.launcher import WorkerGroup
from nemo_rl_core.protocols.weight_sync import SyncReport
from nemo_rl_plugins_weight_syncs.hub import RefitDeadline, call_off
from nemo_rl_plugins_weight_syncs.peers import RefitPeers
from nemo_rl_plugins_weight_syncs.streaming import Received, Route, Sent, Transfer, open_hub, receive, send

__all__ = ["StreamedSync", "WorkerSync", "conclude", "until_all_alive"]


class WorkerSync(ABC):
    """A weight sync that reaches engines in separate processes. A subclass defines one attempt."""

    config_class: ClassVar[type]
    placements: ClassVar[frozenset[str]] = frozenset({"driver", "workers"})

    @abstractmethod
    def _attempt(self, peers: RefitPeers, start: float) -> SyncReport:
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
        deadline = RefitDeadline(timeout_s, version)
        return until_all_alive(engine, deadline, lambda: self._attempt(RefitPeers(trainer, engine, deadline), start))


class StreamedSync(WorkerSync):
    """Streams chunks from ranks of the trainer to the engines. A subclass defines how they are carried.

    Args:
        config: Options; None takes the defaults.
    """

    def __init__(self, config: Any = None) -> None:
        self.config = config or self.config_class()
        self._session = uuid.uuid4().hex
        self._epoch = 0

    def routes(self, trainers: Mapping[int, Place], engines: Sequence[Place]) -> dict[int, tuple[int, ...]]:
        """Which engines each rank of the trainer serves, by their numbers; here rank 0 all of them.

        Args:
            trainers: The ranks that export whole tensors, among them rank 0.
            engines: By number.

        Raises:
            ConfigError: An engine is where no rank reaches it.
        """
        return {0: tuple(range(len(engines)))}

    @abstractmethod
    def carriers(self, trainer: Place, engines: list[Place], transfer: Transfer) -> tuple[tuple[Any, ...], ...]:
        """(class of a rank's carrier, options...), (class of the carrier of the engines that it serves, options...).

        Each is made with the transfer, the torch device of its own side's `Place`, and the options.

        Raises:
            ConfigError: The trainer and the engines are where this sync cannot reach.
        """

    def _attempt(self, peers: RefitPeers, start: float) -> SyncReport:
        try:
            return self._stream(peers, start)
        except BaseException:
            self._epoch += 1  # nothing that was kept for this one is used again
            raise

    def _stream(self, peers: RefitPeers, start: float) -> SyncReport:
        trainers, engines = peers.places()
        names = peers.engine_names
        transfer = Transfer(
            session=self._session,
            epoch=self._epoch,
            version=peers.deadline.version,
            timeout_s=peers.deadline.remaining(),
            chunk_bytes=self.config.chunk_bytes,
            dtype=getattr(peers.engine, "dtype", None),
            fingerprint=self.config.check_fingerprint,
        )
        routes: dict[int, Route] = {}
        server: dict[int, tuple[int, tuple[Any, ...]]] = {}  # of an engine: the rank, and its own carrier
        addresses: dict[int, str | None] = {}
        for rank, numbers in self.routes(trainers, engines).items():
            here, there = trainers[rank], [engines[number] for number in numbers]
            out, into = self.carriers(here, there, transfer)
            routes[rank] = Route(names=tuple(names[number] for number in numbers), device=here.device, carrier=out)
            server |= {number: (rank, into) for number in numbers}
            local = all(place.machine == here.machine for place in there)
            addresses[rank] = None if local else here.address_between_machines()
        rendezvous = peers.trainer(open_hub, (transfer, addresses))
        arguments = []
        for number, (name, place) in enumerate(zip(names, engines, strict=True)):
            rank, into = server[number]
            arguments.append((name, rendezvous[rank], transfer, place.device, *into))
        try:
            sent, received = peers.both(send, (transfer, routes), receive, arguments)
        except BaseException as error:
            for meeting in rendezvous:
                if meeting is not None:
                    call_off(meeting, error)
            raise
        return conclude(
            [sent[server[number][0]] for number in range(len(names))], received, names, transfer, start=start
        )


def until_all_alive(engine: Any, deadline: RefitDeadline, attempt: Callable[[], SyncReport]) -> SyncReport:
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
            engine.wait_alive(deadline.remaining())  # raises what ended it if it does not come back
            continue
        if isinstance(engine, EngineWorkers):
            engine.refitted(report.version)
        return report


def conclude(
    sent: Sequence[Sent], received: Sequence[Received], names: Sequence[str], transfer: Transfer, *, start: float
) -> SyncReport:
    """Compare the weights of trainer and engines, and report.

    Args:
        sent: By engine: what the rank says that served it.
        received: By engine.
        names: Of the engines.
        transfer: The refit.
        start: When it began.

    Raises:
        InvariantViolation: An engine has other weights than were sent, or two ranks sent different ones.
    """
    first = sent[0]
    for name, given, one in zip(names, sent, received, strict=True):
        if one.fingerprint is not None:
            for digest in (one.fingerprint, given.fingerprint):  # the second differs where it was sent other weights
                compare_fingerprints(
                    first.fingerprint, digest, version=transfer.version, num_tensors=first.num_tensors, name=name
                )
    return SyncReport(
        version=transfer.version,
        num_tensors=first.num_tensors,
        num_bytes=first.num_bytes,
        seconds=time.perf_counter() - start,
        fingerprint=first.fingerprint if transfer.fingerprint else "",
        num_bytes_sent=first.num_bytes_sent,
    )
