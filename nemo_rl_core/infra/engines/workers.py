"""Several engine processes as one generation backend.

`EngineWorkers` stands for any number of engine processes, started through any launcher's `WorkerGroup`. It sends each
request to one of them and hands the completion back; a group's requests go to one engine, which shares their prompt.
What a request samples is decided by its own seed, so the routing is a matter of speed alone.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, TypeVar, TypeVarTuple, Unpack

from attrs import evolve

from nemo_rl_core.errors import DeadlineExceeded, InvariantViolation, NemoRLError, WorkerDied
from nemo_rl_core.infra.engines.link import EngineLink, PendingRequest
from nemo_rl_core.infra.engines.loading import load_through_driver
from nemo_rl_core.infra.engines.metrics import merge_engine_metrics
from nemo_rl_core.infra.engines.restarts import EngineRestarts
from nemo_rl_core.infra.engines.routes import EngineRoutes
from nemo_rl_core.machine.deadline import Deadline
from nemo_rl_core.machine.threads import daemon, settle_soon
from nemo_rl_core.protocols.generation_backend import GenerationBackend, GenerationRequest
from nemo_rl_core.records.completion import Completion

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nemo_rl_core.protocols.launcher import WorkerGroup

__all__ = ["EngineWorkers"]

_R = TypeVar("_R")
_Ts = TypeVarTuple("_Ts")
_LATE_S = 60.0
"""Slack added to the refit deadline."""

Refit = Callable[["EngineWorkers"], None]


class EngineWorkers(GenerationBackend):
    """Any number of engine processes behind the contract of one engine. Make it with `EngineWorkers.start`.

    An engine process that dies is started again, up to `max_restarts` times in all; its requests are sampled anew,
    by the others or, once it has its weights, by itself. After that, or if starting it fails, everything that is
    asked of this object raises `WorkerDied` with the name of what died.

    Attributes:
        links: The connection to each engine, by number.
    """

    config_class: ClassVar[type] = dict

    def __init__(self, links: Sequence[EngineLink], *, seed: int = 0, timeout_s: float = 600.0) -> None:
        self.links = list(links)
        self.timeout_s = timeout_s
        self.version = 0
        self._seeds = random.Random(seed)
        self._changed = threading.Condition(threading.RLock())
        self._restarts = EngineRestarts(None, 0, self._changed)
        self._queued: dict[asyncio.AbstractEventLoop, list[PendingRequest]] = {}
        self._stranded: list[PendingRequest] = []
        self._routes = EngineRoutes()
        self._paused = False
        self._refit: Refit | None = None
        self._refit_under_way = False
        self._replacing: set[EngineLink] = set()
        """Dead, and being started again."""
        self._lost_early: dict[EngineLink, BaseException] = {}
        """Dead before they were in `links`."""
        self._was_refitted = False
        self._failure: BaseException | None = None
        self._asleep = False
        self._closed = False

    @classmethod
    def start(
        cls,
        launch: Callable[[int], WorkerGroup],
        *,
        num_workers: int,
        role: str = "generation",
        seed: int = 0,
        timeout_s: float = 600.0,
        heartbeat_timeout_s: float = 60.0,
        max_restarts: int = 0,
    ) -> EngineWorkers:
        """Start every engine and connect to it.

        Args:
            launch: Starts the group (one `EngineHost`) of engine number i; called again when it has died.
            num_workers: Engines.
            role: Begins the engines' names.
            seed: Of requests that carry none.
            timeout_s: Deadline of any call to an engine but `generate`, whose caller sets its own.
            heartbeat_timeout_s: An engine process that answers nothing for so long is ended, as if it had died.
            max_restarts: Engines that may be started again, in all.

        Raises:
            Exception: What `launch` raised; engines that run already are ended.
        """
        made = cls([], seed=seed, timeout_s=timeout_s)

        def connect(index: int) -> EngineLink:
            name = role if num_workers == 1 else f"{role}-{index}"
            group = launch(index)
            try:
                return EngineLink(
                    name,
                    group,
                    timeout_s=timeout_s,
                    heartbeat_timeout_s=heartbeat_timeout_s,
                    on_lost=made._on_lost,
                )
            except BaseException:
                group.shutdown()
                raise

        made._restarts = EngineRestarts(connect, max_restarts, made._changed)
        with concurrent.futures.ThreadPoolExecutor(max(1, num_workers)) as pool:
            started = [pool.submit(connect, index) for index in range(num_workers)]
        failed = [error for future in started if (error := future.exception()) is not None]
        with made._changed:
            made.links = [future.result() for future in started if future.exception() is None]
            made._handle_early()
        if failed:
            made.shutdown()
            raise failed[0]
        return made

    @property
    def num_restarts(self) -> int:
        """Engines that were started again, or should have been."""
        return self._restarts.num

    def setup(self, config: object, context: object) -> None:
        """Do nothing: `start` has set the engines up."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Type of the engines' weights; None if they do not say."""
        return self.links[0].served.dtype

    @property
    def capabilities(self) -> frozenset[str]:  # type: ignore[override]
        """Capabilities of the engines without "share_weights": processes share no tensors."""
        return self.links[0].served.capabilities - {"share_weights"}

    # -- requests ----------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one completion in one of the engines; cancelling the call frees its place there.

        Raises:
            GenerationError: As the engine raises it, with its name.
            WorkerDied: An engine died that cannot be started again.
        """
        if request.sampling.seed is None:  # drawn here, so that it does not depend on the routing
            request = evolve(request, sampling=evolve(request.sampling, seed=self._seeds.getrandbits(63)))
        loop = asyncio.get_running_loop()
        pending = PendingRequest(request=request, future=loop.create_future(), loop=loop)
        with self._changed:
            self._raise_failure()
            queue = self._queued.setdefault(loop, [])
            queue.append(pending)
            if len(queue) == 1:  # what this turn of the loop asks for goes in one message
                loop.call_soon(self._flush, loop)
        try:
            return await pending.future
        except asyncio.CancelledError:
            self._give_up(pending)
            raise

    def pause(self) -> None:
        """Let every engine accept requests but start none until `resume`."""
        with self._changed:
            self._paused = True
            for link in self.links:
                link.tell("pause")

    def resume(self) -> None:
        """Let every engine start its waiting requests."""
        with self._changed:
            self._paused = False
            for loop in list(self._queued):
                self._flush(loop)
            for link in self.links:
                link.tell("resume")

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._changed:
            self._send([one for one in self._queued.pop(loop, []) if not one.future.done()])

    def _send(self, requests: Sequence[PendingRequest]) -> None:
        """Give each request to an engine; if none is ready, the request waits until one comes back."""
        ready = {link: None for link in self.links if self._ready(link)}
        chosen: dict[EngineLink, list[PendingRequest]] = {}
        for one in requests:
            link = self._routes.choose(one.request, ready, chosen)
            if link is None:
                self._stranded.append(one)
            else:
                chosen.setdefault(link, []).append(one)
        for link, sent in chosen.items():
            if not link.generate(sent):
                self._stranded.extend(sent)
        self._changed.notify_all()

    def _ready(self, link: EngineLink) -> bool:
        return link.lost is None and link.version == self.version

    def _give_up(self, pending: PendingRequest) -> None:
        with self._changed:
            if pending.link is not None:
                pending.link.cancel(pending)
            elif pending in self._stranded:
                self._stranded.remove(pending)

    # -- everything else ---------------------------------------------------------------------------

    def apply(
        self, function: Callable[[GenerationBackend, Unpack[_Ts]], _R], /, *args: *_Ts, timeout_s: float | None = None
    ) -> list[_R]:
        """Run `function(engine, *args)` in every engine's process at once; return the results by engine.

        It runs in a thread beside the engine's requests. Waits for an engine that is being started again.

        Raises:
            DeadlineExceeded: Names the engine that did not answer.
            WorkerDied: An engine is gone for good.
            Exception: What the function raised, with the engine's name.
        """
        limit = self.timeout_s if timeout_s is None else timeout_s
        deadline = Deadline(limit)
        links = self.wait_alive(limit)
        asked = [link.submit(function, *args) for link in links]
        what = getattr(function, "__name__", type(function).__name__)
        return [
            link.wait(future, what=what, timeout_s=deadline.remaining())
            for link, future in zip(links, asked, strict=True)
        ]

    def submit_each(
        self, function: Callable[[GenerationBackend, Unpack[_Ts]], _R], arguments: Sequence[tuple[*_Ts]]
    ) -> list[concurrent.futures.Future[_R]]:
        """Start `function(engine, *arguments[i])` in engine i and return a future for each engine, without waiting."""
        return [link.submit(function, *args) for link, args in zip(self.links, arguments, strict=True)]

    def refitted(self, version: int) -> None:
        """Note that a weight sync has brought every engine to `version`: from now on they take requests."""
        with self._changed:
            self.version = version
            self._was_refitted = True
            for link in self.links:
                link.version = version
            waiting, self._stranded = self._stranded, []
            self._send(waiting)

    @property
    def needs_refit(self) -> bool:
        """Whether an engine was started again and has not got its weights yet."""
        with self._changed:
            return any(link.lost is not None or link.version != self.version for link in self.links)

    @property
    def needs_all_weights(self) -> bool:
        """Whether every engine died and was not refitted since: the requests that came wait for that."""
        with self._changed:
            return not any(self._ready(link) for link in self.links)

    def update_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]], *, share: bool = False) -> None:
        """Load new weights, by name and of any shape [...], into every engine through this process.

        A run uses a weight sync instead, which moves them from worker to worker. `share` is ignored.
        """
        load_through_driver(self, version, tensors)
        self.refitted(version)

    def fingerprint(self) -> str:
        """Digest of the weights that all engines sample from.

        Raises:
            InvariantViolation: Two engines have other weights.
        """
        found = self._ask(GenerationBackend.fingerprint)
        if len(set(found)) > 1:
            listed = ", ".join(f"{link.name} {digest}" for link, digest in zip(self.links, found, strict=True))
            raise InvariantViolation(f"The engines have different weights: {listed}. Refit all of them.")
        return str(found[0])

    def metrics(self) -> Mapping[str, float]:
        """Counters since the last call, summed or (for shares) averaged over the engines, and the restarts so far.

        What an engine had counted that died is lost; nobody waits here for one that is being started again.
        """
        merged = merge_engine_metrics(self._ask(GenerationBackend.metrics, of_all=False))
        return {**merged, "engines": float(len(self.links)), "engine_restarts": float(self.num_restarts)}

    def sleep(self) -> None:
        """Release memory in every engine. One that dies while asleep is started again when the others wake."""
        self._ask(GenerationBackend.sleep)
        with self._changed:
            self._asleep = True

    def wake(self) -> None:
        """Undo `sleep` in every engine."""
        with self._changed:
            self._asleep = False
            self._changed.notify_all()
        self._ask(GenerationBackend.wake)

    @property
    def waits_to_start(self) -> bool:
        """Whether an engine died while asleep and will be started again when all are woken."""
        with self._changed:
            return self._asleep and self._failure is None and any(link in self._replacing for link in self.links)

    def shutdown(self) -> None:
        """End every engine process; may be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self.links:
            with concurrent.futures.ThreadPoolExecutor(len(self.links)) as pool:
                list(pool.map(EngineLink.close, self.links))

    def _ask(self, method: Callable[[GenerationBackend], _R], *, of_all: bool = True) -> list[_R]:
        """Call a method of every engine, or of those that are running; repeat it if one dies and comes back."""
        deadline = Deadline(self.timeout_s)
        while True:
            links = self.wait_alive(deadline.remaining(), of_all=of_all)
            try:
                asked = [link.submit_method(method) for link in links]
                return [
                    link.wait(future, what=method.__name__, timeout_s=deadline.remaining())
                    for link, future in zip(links, asked, strict=True)
                ]
            except WorkerDied:
                if all(link.lost is None for link in links):
                    raise

    def wait_alive(self, timeout_s: float, *, of_all: bool = True) -> list[EngineLink]:
        """Wait for engines that are being started again and return all; without `of_all`, those that run now.

        Raises:
            DeadlineExceeded: Names those that are not.
            WorkerDied: One is gone for good, or died in its sleep.
        """

        def settled() -> bool:
            gone = [link for link in self.links if link.lost is not None]
            return self._failure is not None or (self._replacing.issuperset(gone) if not of_all else not gone)

        with self._changed:
            if self._restarts.launch is None:  # nobody starts one again
                self._failure = self._failure or next((link.lost for link in self.links if link.lost is not None), None)
            back = self._changed.wait_for(lambda: settled() or self.waits_to_start, timeout_s)
            if self.waits_to_start and of_all:
                raise next(link.lost for link in self.links if link.lost is not None)
            self._raise_failure()
            if not back:
                gone = ", ".join(link.name for link in self.links if link.lost is not None)
                raise DeadlineExceeded(f"The engines {gone} were not back after {timeout_s:g} s. See their logs.")
            return [link for link in self.links if link.lost is None]

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    # -- engines that die --------------------------------------------------------------------------

    @contextmanager
    def refits(self, refit: Refit, *, timeout_s: float | None = None) -> Iterator[None]:
        """While the block runs, an engine that has come back is refitted with `refit`, which gets it alone.

        The run loop opens it where the trainer stands still, as while it waits for rollouts. The block ends when a
        refit under way has ended, for which it waits a little longer than `timeout_s` (None: that of calls).

        Raises:
            DeadlineExceeded: That refit did not end, though it has a deadline of its own.
        """
        with self._changed:
            self._refit = refit
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._refit = None
                limit = (self.timeout_s if timeout_s is None else timeout_s) + _LATE_S
                if not self._changed.wait_for(lambda: not self._refit_under_way, limit):
                    raise DeadlineExceeded(f"The refit of an engine that was started again did not end in {limit:g} s.")

    def _on_lost(self, link: EngineLink, reason: BaseException) -> None:
        """Replace a lost engine. This runs in the thread of the link's reader, which has no other work left."""
        with self._changed:
            if self._closed:
                return
            if link not in self.links:  # of a start that is under way
                self._lost_early[link] = reason
                return
            index = self.links.index(link)
            orphans, link.pending = list(link.pending.values()), {}
            for one in orphans:
                one.link = None
            if not self._restarts.is_left:
                self._fail(reason, orphans)
                return
            self._restarts.spend(reason, f"; {len(orphans)} requests in flight are sampled anew")
            self._replacing.add(link)
            self._send([one for one in orphans if not one.future.done()])
        try:
            fresh = self._start_again(index, link)
            if fresh is not None:
                self._bring_back(fresh)
        except BaseException as error:  # handed to everyone who waits for the engine
            with self._changed:
                self._replacing.discard(link)
                self._fail(error, [])

    def _handle_early(self) -> None:
        """Treat an engine that died before it was one of `links` as one that dies now."""
        for link in [link for link in self.links if link in self._lost_early]:
            lost = (link, self._lost_early.pop(link))
            daemon(self._on_lost, *lost, name=f"nemo-rl-{link.name}-lost")

    def _start_again(self, index: int, link: EngineLink) -> EngineLink | None:
        """Start a new engine in place of a dead one; None if it is no longer wanted."""
        link.group.shutdown()
        if not self._until_awake():
            return None
        fresh = self._restarts.start(index, is_wanted=lambda: not self._closed)
        if fresh is None:
            return None
        fresh.version = -1 if self._was_refitted else self.version  # it has the weights of its checkpoint
        with self._changed:
            self.links[index] = fresh
            self._replacing.discard(link)
            if self._closed:
                fresh.close()
                return None
            self._handle_early()
            if self._paused:
                fresh.tell("pause")
            waiting, self._stranded = self._stranded, []
            self._send(waiting)
        return fresh

    def _until_awake(self) -> bool:
        """Wait until the engines are awake, as others use their devices before; False if they were shut down first."""
        with self._changed:
            self._changed.wait_for(lambda: not self._asleep or self._closed)
            return not self._closed

    def _bring_back(self, fresh: EngineLink) -> None:
        """Refit an engine when the trainer has time for it, unless a refit of all of them comes first.

        It may wait for long in this thread of its own; whoever waits for the engine has a deadline.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._done_with(fresh) or (self._refit is not None and not self._refit_under_way)
            )
            refit = self._refit
            if refit is None or self._done_with(fresh):
                return
            self._refit_under_way = True
        alone = EngineWorkers([fresh], timeout_s=self.timeout_s)
        try:
            refit(alone)
        except WorkerDied:
            if fresh.lost is None:
                raise
            # it has died again, which the thread of its link takes care of
        finally:
            with self._changed:
                self._refit_under_way = False
                waiting, self._stranded = self._stranded, []
                self._send(waiting)

    def _done_with(self, fresh: EngineLink) -> bool:
        return self._closed or fresh.lost is not None or fresh.version == self.version

    def _fail(self, reason: BaseException, orphans: Sequence[PendingRequest]) -> None:
        self._failure = reason
        stranded, self._stranded = self._stranded, []
        queued = [one for queue in self._queued.values() for one in queue]
        self._queued.clear()
        for one in (*orphans, *stranded, *queued):
            # A copy for each waiter: if one exception were raised twice, its traceback would hold both.
            copy = type(reason)(*reason.args) if isinstance(reason, NemoRLError) else reason
            settle_soon(one.future, None, copy)
        self._changed.notify_all()
