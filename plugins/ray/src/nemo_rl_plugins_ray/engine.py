"""The driver's side of generation engines that live in actors."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from nemo_rl_core.errors import InvariantViolation, WorkerDied
from nemo_rl_core.infra.remote import raised_by
from nemo_rl_plugins_ray.group import RayWorkerGroup
from nemo_rl_plugins_ray.members import Member
from nemo_rl_plugins_ray.wire import decode

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_rl_core.protocols.generation_backend import Completion, GenerationRequest

__all__ = ["EngineGroup", "RemoteEngine"]

_CHUNK_BYTES = 64 * 2**20
_WATCH_S = 1.0
Chunks = Iterable[list[tuple[str, "Tensor"]]]


class EngineGroup(RayWorkerGroup):
    """The actors of the generation engines; `local` is the generation backend that stands for all of them."""

    _engine: RemoteEngine | None = None

    def connect(self, facts: Mapping[str, Any]) -> None:
        """The engines are set up: begin to collect completions."""
        self._engine = RemoteEngine(self, dtype=facts["dtype"])

    @property
    def local(self) -> Any:
        """The generation backend to call in this process."""
        return self._engine

    def shutdown(self) -> None:
        """Stop collecting, shut the engines down; does nothing the second time."""
        if self._engine is not None:
            self._engine.close()
        super().shutdown()


class RemoteEngine:
    """A `GenerationBackend` whose engines live in actors.

    Requests of one tick of the event loop travel together, and so do completions. A group of rollouts always goes to
    the same engine, by its number: it shares the prompt there, and a run is reproducible.

    Args:
        group: The engines' actors.
        dtype: That of their weights; None if they do not say.
    """

    config_class = dict

    def __init__(self, group: EngineGroup, *, dtype: Any) -> None:
        self.group = group
        self.dtype = dtype
        self._mailboxes = [_Mailbox(group, member) for member in group.members]

    # -- generation -----------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one completion on one of the engines; cancelling the call takes the request back.

        Raises:
            WorkerDied: The engine is gone.
            GenerationError: As the engine raises it.
        """
        index = request.order[0] if request.order else hash(request.request_id)
        found: Completion = await self._mailboxes[index % len(self._mailboxes)].ask(request)
        return found

    def pause(self) -> None:
        """Take requests but do not start on them until `resume`."""
        self._all("pause")

    def resume(self) -> None:
        """Undo `pause`, once every engine has what was asked for until now."""
        for mailbox in self._mailboxes:
            mailbox.flush()
        self._all("resume")

    # -- weights --------------------------------------------------------------------------------

    def update_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]], *, share: bool = False) -> None:
        """Load new weights into every engine; they pass through this process. `share` cannot be honoured.

        Raises:
            GenerationError: As the engine raises it.
        """
        self.load(version, (self.group.put(chunk) for chunk in _chunks(tensors)), timeout_s=self.group.call_timeout_s)

    def load(self, version: int, chunks: Iterator[Any], *, timeout_s: float) -> None:
        """Load chunks of named tensors into every engine.

        Args:
            version: Stamp for what is sampled from now on.
            chunks: Packets, or references to packets in the object store, which then go straight to the engines.
            timeout_s: Deadline of all of it.
        """
        deadline = time.monotonic() + timeout_s
        self._tell("begin_refit", timeout_s, version, timeout_s)
        try:
            under_way: dict[int, Any] = {}
            for chunk in chunks:
                self.group.collect("update_weights", under_way, deadline - time.monotonic())
                under_way = {m.rank: m.actor.load.remote(chunk) for m in self.group.members}
            self.group.collect("update_weights", under_way, deadline - time.monotonic())
            self._tell("end_refit", deadline - time.monotonic())
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self._tell("abort_refit", 5.0)
            raise

    def fingerprint(self) -> str:
        """Digest of the weights that every engine samples from.

        Raises:
            InvariantViolation: They differ from engine to engine.
        """
        found = self._all("fingerprint")
        if len(set(found)) > 1:
            told = ", ".join(f"{m.place}: {f}" for m, f in zip(self.group.members, found, strict=True))
            raise InvariantViolation(f"The engines hold different weights: {told}.")
        return str(found[0])

    # -- the rest -------------------------------------------------------------------------------

    def metrics(self) -> Mapping[str, float]:
        """Means over the engines; of counts (`num_...`) the sums."""
        rows = self._all("metrics")
        sums: dict[str, float] = {}
        for row in rows:
            for name, value in row.items():
                sums[name] = sums.get(name, 0.0) + value
        return {n: v if n.startswith("num_") else v / len(rows) for n, v in sums.items()}

    def sleep(self) -> None:
        """Give back memory between rollouts."""
        self._all("sleep")

    def wake(self) -> None:
        """Undo `sleep`."""
        self._all("wake")

    def shutdown(self) -> None:
        """End the engines."""
        self.group.shutdown()

    def close(self) -> None:
        """Stop waiting for completions; whoever still waits is told."""
        for mailbox in self._mailboxes:
            mailbox.close(WorkerDied(f"The {self.group.role} workers were shut down."))

    def _all(self, method: str) -> list[Any]:
        return self.group.call(method)

    def _tell(self, method: str, timeout_s: float, *args: Any) -> None:
        refs = {m.rank: getattr(m.actor, method).remote(*args) for m in self.group.members}
        self.group.collect("update_weights", refs, timeout_s)


def _chunks(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    chunk: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        chunk.append((name, tensor))
        size += tensor.numel() * tensor.element_size()
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Mailbox:
    """Requests to one engine and its completions."""

    def __init__(self, group: EngineGroup, member: Member) -> None:
        self._group = group
        self._member = member
        self._tickets = itertools.count()
        self._lock = threading.Lock()
        self._outbox: list[tuple[int, GenerationRequest]] = []
        self._waiting: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Future[Any]]] = {}
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._collect, name=f"completions-{member.rank}", daemon=True)
        self._thread.start()

    async def ask(self, request: GenerationRequest) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        ticket = next(self._tickets)
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._waiting[ticket] = (loop, future)
            self._outbox.append((ticket, request))
            first = len(self._outbox) == 1
        if first:
            loop.call_soon(self.flush)
        try:
            return await future
        except asyncio.CancelledError:
            with self._lock:
                gone = self._waiting.pop(ticket, None) is None or self._failure is not None
            if not gone:
                self._member.actor.cancel.remote([ticket])
            raise

    def flush(self) -> None:
        """Send what was asked for since the last time; messages to an actor keep their order."""
        with self._lock:
            requests, self._outbox = self._outbox, []
            if requests and self._failure is None:
                self._member.actor.submit.remote(self._group.put(requests))

    def close(self, failure: BaseException) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = failure
            waiting, self._waiting = list(self._waiting.values()), {}
        for loop, future in waiting:
            _settle(loop, future, None, failure)

    def _collect(self) -> None:
        """Thread: take completions until the engine or this mailbox is closed."""
        try:
            while self._failure is None:
                ref = self._member.actor.collect.remote()
                while not ray.wait([ref], timeout=_WATCH_S)[0]:
                    if self._failure is not None:
                        return
                kind, value = decode(ray.get(ref))
                if kind == "error":
                    raise raised_by(self._group.role, self._member.rank, value)
                for ticket, outcome, result in value:
                    self._deliver(ticket, outcome, result)
        except RayError as error:
            if self._failure is None:
                self.close(self._group.died(self._member.rank, "generate", error))
        except BaseException as error:  # told to whoever waits
            self.close(error)

    def _deliver(self, ticket: int, outcome: str, result: Any) -> None:
        with self._lock:
            waiting = self._waiting.pop(ticket, None)
        if waiting is None:
            return  # cancelled meanwhile
        if outcome == "error":
            _settle(*waiting, None, raised_by(self._group.role, self._member.rank, result))
        else:
            _settle(*waiting, result, None)


def _settle(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], result: Any, error: BaseException | None
) -> None:
    def run() -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(run)
