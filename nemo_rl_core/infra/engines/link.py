"""The driver's connection to one engine process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import operator
import pickle
import secrets
import threading
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, Unpack

from attrs import define

from nemo_rl_core.errors import DeadlineExceeded, WorkerDied
from nemo_rl_core.infra.engines.host import EngineHost
from nemo_rl_core.infra.workers.remote import raised_by
from nemo_rl_core.machine.arrivals import arrive
from nemo_rl_core.machine.heartbeat import Heartbeat, keep_alive, shut
from nemo_rl_core.machine.place import find_place
from nemo_rl_core.machine.threads import daemon, settle
from nemo_rl_core.protocols.launcher import on_workers

if TYPE_CHECKING:
    from nemo_rl_core.infra.workers.remote import ErrorReport
    from nemo_rl_core.protocols.generation_backend import GenerationBackend, GenerationRequest
    from nemo_rl_core.protocols.launcher import WorkerGroup
    from nemo_rl_core.records.completion import Completion

__all__ = ["EngineLink", "PendingRequest"]

_R = TypeVar("_R")
_Ts = TypeVarTuple("_Ts")
_ASK_S = 10.0
"""Deadline of asking a launcher what became of a worker."""
_ASK_SILENT_S = 1.0
"""The same for one that has been silent for long: it is ended all the same."""


@define(eq=False)
class PendingRequest:
    """A request that waits for its completion."""

    request: GenerationRequest
    future: asyncio.Future[Completion]
    loop: asyncio.AbstractEventLoop
    number: int = -1
    """In its link; -1 while it is with none."""
    link: EngineLink | None = None

    def settle(self, completion: Completion | None, error: BaseException | None) -> None:
        """Hand over the outcome; called in the loop's thread."""
        if error is not None or completion is not None:
            settle(self.future, completion, error)


_Settled = tuple[PendingRequest, "Completion | None", BaseException | None]
"""A request and its outcome."""


class EngineLink:
    """One engine worker: its process group, its connection, and what is in flight there.

    Args:
        name: In messages and metrics, such as `generation-1`.
        group: Its worker, one `EngineHost`.
        timeout_s: Deadline of connecting.
        heartbeat_timeout_s: An engine process that answers nothing for so long is ended, and is lost.
        on_lost: Called once, in a thread of its own, with this link and the reason when the process is gone.

    Raises:
        WorkerDied: The process ended meanwhile.
        DeadlineExceeded: It did not answer.
    """

    def __init__(
        self,
        name: str,
        group: WorkerGroup,
        *,
        timeout_s: float,
        heartbeat_timeout_s: float,
        on_lost: Callable[[EngineLink, BaseException], None],
    ) -> None:
        self.name = name
        self.group = group
        key = secrets.token_bytes(32)
        served = on_workers(group, EngineHost.serve, timeout_s=timeout_s)(key, find_place())[0]
        self.served = served
        self.version = 0
        """Weight version it samples from."""
        self.pending: dict[int, PendingRequest] = {}
        self._silent = False
        try:
            who = f"The engine {name} on {served.place.host}"
            self._connection: Connection = arrive(served.address, key, who=who, timeout_s=timeout_s)
        except (OSError, EOFError) as error:
            raise self._reason() from error
        keep_alive(self._connection, timeout_s=heartbeat_timeout_s)
        self._calls: dict[int, concurrent.futures.Future[Any]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._out: SimpleQueue[Any] = SimpleQueue()
        self._on_lost = on_lost
        self._closing = False
        self.lost: BaseException | None = None
        self._heartbeat = Heartbeat(
            ping=partial(self._out.put, ("ping",)),
            on_silence=self._give_up,
            timeout_s=heartbeat_timeout_s,
            name=f"nemo-rl-{name}-heartbeat",
        )
        for target in (self._read, self._write):
            daemon(target, name=f"nemo-rl-{name}")

    @property
    def is_late(self) -> bool:
        """Whether the engine's heartbeat is late, so that it should get no more work."""
        return self._heartbeat.is_late

    @property
    def load(self) -> int:
        """Number of requests in flight."""
        return len(self.pending)

    # -- requests ----------------------------------------------------------------------------------

    def generate(self, pending: Sequence[PendingRequest]) -> bool:
        """Send requests in one message; return False, having taken none, if the engine is gone."""
        with self._lock:
            if self.lost is not None:
                return False
            for one in pending:
                one.number, one.link = next(self._numbers), self
                self.pending[one.number] = one
            self._out.put(("generate", [(one.number, one.request) for one in pending]))
        return True

    def cancel(self, pending: PendingRequest) -> None:
        """Give up a request."""
        if self.pending.pop(pending.number, None) is not None:
            self._out.put(("cancel", [pending.number]))

    def tell(self, word: str) -> None:
        """Send `pause` or `resume`, in order with the requests."""
        self._out.put((word,))

    # -- calls -------------------------------------------------------------------------------------

    def submit(
        self, function: Callable[[GenerationBackend, Unpack[_Ts]], _R], /, *args: *_Ts
    ) -> concurrent.futures.Future[_R]:
        """Run `function(engine, *args)` in a thread of the engine's process, beside its requests."""
        import cloudpickle

        future: concurrent.futures.Future[_R] = concurrent.futures.Future()
        payload = cloudpickle.dumps((function, args))
        with self._lock:
            if self.lost is not None:
                future.set_exception(self.lost)
                return future
            number = next(self._numbers)
            self._calls[number] = future
            self._out.put(("call", number, payload))
        return future

    def submit_method(
        self, method: Callable[[GenerationBackend, Unpack[_Ts]], _R], /, *args: *_Ts
    ) -> concurrent.futures.Future[_R]:
        """Call a method of the engine, named by that of the contract, as `submit` calls a function."""
        return self.submit(operator.methodcaller(method.__name__, *args))

    def ask(self, method: Callable[[GenerationBackend, Unpack[_Ts]], _R], /, *args: *_Ts, timeout_s: float) -> _R:
        """Call a method of the engine and wait: `ask(GenerationBackend.fingerprint, timeout_s=5.0)`.

        Raises:
            DeadlineExceeded: Names this engine and the method.
            WorkerDied: The process is gone.
        """
        return self.wait(self.submit_method(method, *args), what=method.__name__, timeout_s=timeout_s)

    def wait(self, future: concurrent.futures.Future[_R], *, what: str, timeout_s: float) -> _R:
        """Wait for the result of `submit`; raises what `ask` raises."""
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError as error:
            if future.done():  # it raised a TimeoutError itself
                raise
            raise DeadlineExceeded(
                f"{what} on the engine {self.name} (pid {self.served.pid} on {self.served.place.host}) passed its "
                f"deadline of {timeout_s:g} s. Look at that worker's log, or raise generation.call_timeout_s."
            ) from error

    def close(self) -> None:
        """Leave the engine and end its process; may be called twice."""
        self._closing = True
        self._heartbeat.stop()
        self._out.put(None)
        self.group.shutdown()
        with contextlib.suppress(OSError):
            self._connection.close()

    # -- threads -----------------------------------------------------------------------------------

    def _write(self) -> None:
        while (message := self._out.get()) is not None:
            try:
                self._connection.send_bytes(pickle.dumps(message))
            except OSError:  # the reader notices it as well, and says so
                return

    def _read(self) -> None:
        while True:
            try:
                kind, *rest = pickle.loads(self._connection.recv_bytes())
            except (EOFError, OSError, TypeError):  # TypeError: closed by this side while it was read
                break
            self._heartbeat.heard()
            if kind == "done":
                self._settle(rest[0])
            elif kind == "answer":
                self._answer(*rest)
        self._heartbeat.stop()
        if not self._closing:
            self._lose()

    def _settle(self, done: Sequence[tuple[int, Completion | None, ErrorReport | None]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[_Settled]] = {}
        for number, completion, described in done:
            pending = self.pending.pop(number, None)
            if pending is not None:
                error = None if described is None else raised_by(self.name, 0, described)
                by_loop.setdefault(pending.loop, []).append((pending, completion, error))
        for loop, settled in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                loop.call_soon_threadsafe(_settle_all, settled)

    def _answer(self, number: int, ok: bool, payload: bytes) -> None:
        future = self._calls.pop(number, None)
        if future is None:
            return
        try:
            value = pickle.loads(payload)
        except Exception as error:  # what it is made of is not importable here
            future.set_exception(error)
            return
        if ok:
            future.set_result(value)
        else:
            future.set_exception(raised_by(self.name, 0, value))

    def _give_up(self) -> None:
        """Treat the silent process as dead: the reader's thread notices it. This runs in the heartbeat's thread."""
        self._silent = True
        shut(self._connection)

    def _lose(self) -> None:
        reason = self._reason()
        with self._lock:
            self.lost = reason
            calls, self._calls = self._calls, {}
        for future in calls.values():
            future.set_exception(reason)
        self._out.put(None)
        self._on_lost(self, reason)

    def _reason(self) -> BaseException:
        """Ask the launcher what became of the process; a silent process is ended."""
        served = self.served
        if self._silent:
            with contextlib.suppress(Exception):  # a worker that misses a deadline is ended by its launcher
                on_workers(self.group, EngineHost.ping, timeout_s=_ASK_SILENT_S)()
            with contextlib.suppress(Exception):
                self.group.shutdown()
            return WorkerDied(
                f"The engine {self.name} (pid {served.pid} on {served.place.host}) answered nothing for "
                f"{self._heartbeat.timeout_s:g} s (generation.heartbeat_timeout_s) and was ended: its process hangs, "
                "or its machine is gone."
            )
        try:
            on_workers(self.group, EngineHost.ping, timeout_s=_ASK_S)()
        except Exception as error:  # whatever the launcher says of a worker that is gone
            return WorkerDied(f"The engine {self.name} is gone. {error}".replace(" during ping", ""))
        return WorkerDied(f"The engine {self.name} (pid {served.pid} on {served.place.host}) closed its connection.")


def _settle_all(settled: Sequence[_Settled]) -> None:
    for pending, completion, error in settled:
        pending.settle(completion, error)
