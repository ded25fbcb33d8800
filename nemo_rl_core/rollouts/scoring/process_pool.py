"""Worker processes with a hard deadline, for scoring that may hang, crash or hold the GIL."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import selectors
import socket
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, TypeVar

from attrs import define

from nemo_rl_core.errors import DeadlineExceeded, NemoRLError, WorkerDied
from nemo_rl_core.machine.deadline import Deadline
from nemo_rl_core.machine.threads import settle_soon
from nemo_rl_core.rollouts.scoring._pool_pickling import (
    cannot_send,
    dump,
    name_of,
    pickle_by_value,
    pickle_function,
    unpack,
)
from nemo_rl_core.rollouts.scoring._pool_process import WorkerProcess

__all__ = ["ProcessPool"]

_log = logging.getLogger(__name__)
_TICK_S = 0.1
_START_TIMEOUT_S = 120.0
_MAX_FAILED_STARTS = 3
_R = TypeVar("_R")


@define(eq=False)
class _Call:
    """One call on its way."""

    name: str
    digest: bytes
    function: bytes
    arguments: bytes
    timeout_s: float
    answer: asyncio.Future[bytes]
    deadline: Deadline | None = None
    loading: bool = False
    tried_before: bool = False
    """Its first process ended under it."""

    def resolve(self, value: bytes | BaseException) -> None:
        """Hand the answer to the caller's event loop, from any thread."""
        result, error = (None, value) if isinstance(value, BaseException) else (value, None)
        if not settle_soon(self.answer, result, error):
            _log.debug("nobody waits for %s any more", self.name)


class ProcessPool:
    """Runs functions in worker processes; a call that passes its deadline is killed, not waited for.

    Workers start when first needed, import neither torch nor the user's `__main__`, and have a process
    group each: a kill reaches what the function itself started. A function travels once to each worker;
    functions of `__main__`, closures and lambdas go by value, as they were when first used. What a
    function prints is kept out of the terminal and shown when its worker crashes. A call whose worker dies is made
    once more in another: it may have been killed for no fault of its own, as when memory is short.

    Args:
        num_workers: Processes.
        default_timeout_s: Deadline of a call that names none, from when a worker takes it (the time in
            the queue, and a worker's first import of the function's module, do not count).
        max_queued: Calls that may wait for a worker; further callers wait to be admitted.
    """

    def __init__(self, num_workers: int, *, default_timeout_s: float, max_queued: int = 4096) -> None:
        self.num_workers = num_workers
        self.default_timeout_s = default_timeout_s
        self._max_queued = max_queued
        self._lock = threading.RLock()
        self._queue: deque[_Call] = deque()
        self._entering: deque[asyncio.Future[None]] = deque()
        self._workers: dict[WorkerProcess, _Call | None] = {}
        self._idle: list[WorkerProcess] = []
        self._starting: dict[WorkerProcess, Deadline] = {}
        self._failed_starts = 0
        self._functions: OrderedDict[Any, tuple[bytes, bytes]] = OrderedDict()
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread: threading.Thread | None = None
        self._closed = False
        self.num_killed = 0
        """Workers killed at a deadline so far."""
        self.num_crashed = 0
        """Workers that ended by themselves so far."""

    # -- calling --------------------------------------------------------------------------------

    async def run(
        self, function: Callable[..., _R], *args: object, timeout_s: float | None = None, **kwargs: object
    ) -> _R:
        """Call `function(*args, **kwargs)` in a worker process and return what it returns.

        May be awaited from any event loop of any thread.

        Raises:
            DeadlineExceeded: It did not answer in `timeout_s`; its process has been killed.
            WorkerDied: Its process ended, and so did a second one (exit status and last output in the message).
            RewardError: Function or arguments cannot be sent to another process.
            Exception: Whatever the function raised, with the worker's traceback as a note.
        """
        name = name_of(function)
        digest, pickled = self._pickled(function)
        try:
            arguments = dump((args, kwargs))
        except Exception as error:
            raise cannot_send(name, "its arguments", error) from error
        budget = self.default_timeout_s if timeout_s is None else timeout_s
        for by_value in (False, True):
            if by_value:
                digest, pickled = pickle_by_value(function)
            await self._enter()
            future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            call = _Call(name, digest, pickled, arguments, budget, future)
            self._submit(call)
            answer = await call.answer
            if answer[:1] != b"M":
                break
            if by_value:
                raise cannot_send(name, "the function", ModuleNotFoundError(answer[1:].decode()))
        result: _R = unpack(name, answer)
        return result

    def can_ship(self, function: Callable[..., object]) -> bool:
        """Whether the function can be sent to a worker at all."""
        try:
            self._pickled(function)
        except NemoRLError:
            return False
        return True

    def shutdown(self) -> None:
        """Kill every worker and fail the calls that wait; may be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            waiting = [c for c in self._workers.values() if c is not None] + list(self._queue)
            self._queue.clear()
            entering, self._entering = list(self._entering), deque()
            workers = list(self._workers)
            self._workers.clear()
            self._idle.clear()
            self._starting.clear()
        self._wake()
        for worker in workers:
            worker.kill()
        for call in waiting:
            call.resolve(WorkerDied(f"The process pool was shut down while {call.name} was waiting."))
        for turn in entering:
            settle_soon(turn, None)
        if self._thread is None or self._thread is threading.current_thread():
            self._close_channels()
        else:
            self._thread.join(timeout=5.0)

    def __del__(self) -> None:
        """A pool that nobody holds any more leaves no process behind."""
        with contextlib.suppress(Exception):
            self.shutdown()

    def _close_channels(self) -> None:
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()

    # -- queue ----------------------------------------------------------------------------------

    async def _enter(self) -> None:
        """Wait for room in the queue."""
        while True:
            with self._lock:
                self._require_open()
                if len(self._queue) < self._max_queued:
                    return
                turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._entering.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                with self._lock:  # its turn, if it had come, goes to another
                    self._admit()
                raise

    def _admit(self) -> None:
        """Let as many callers in as there is room for. Holds the lock."""
        for _ in range(min(self._max_queued - len(self._queue), len(self._entering))):
            settle_soon(self._entering.popleft(), None)

    def _submit(self, call: _Call) -> None:
        with self._lock:
            self._require_open()
            if self._thread is None:
                self._start_thread()
            if self._idle:
                self._assign(self._idle.pop(), call)
                return
            self._queue.append(call)
            grow = len(self._workers) < self.num_workers
        if grow:
            self._wake()

    def _require_open(self) -> None:
        if self._closed:
            raise WorkerDied("The process pool has been shut down.")

    def _assign(self, worker: WorkerProcess, call: _Call) -> None:
        """Send a call to an idle worker. Holds the lock."""
        self._workers[worker] = call
        try:
            call.loading = worker.send_call(call.digest, call.function, call.arguments)
        except OSError as error:  # it died while idle: the loop sees its end and answers the call
            _log.debug("worker %d did not take a call: %s", worker.process.pid, error)
        budget = max(_START_TIMEOUT_S, call.timeout_s) if call.loading else call.timeout_s
        call.deadline = Deadline(budget)

    def _next(self, worker: WorkerProcess) -> None:
        """Give a free worker the next call that somebody still waits for. Holds the lock."""
        self._workers[worker] = None
        while self._queue:
            call = self._queue.popleft()
            if not call.answer.done():
                self._assign(worker, call)
                break
        else:
            self._idle.append(worker)
        self._admit()

    # -- the thread that serves the workers -------------------------------------------------------

    def _start_thread(self) -> None:
        self._selector.register(self._wake_out, selectors.EVENT_READ, None)
        self._thread = threading.Thread(
            target=_serve, args=(weakref.ref(self),), name="nemo-rl-process-pool", daemon=True
        )
        atexit.register(_shutdown_at_exit, weakref.ref(self))
        self._thread.start()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake already; closed: it is over
            self._wake_in.send(b"x")

    def _serve_once(self) -> bool:
        """One round of the service thread; False ends it."""
        events = self._selector.select(_TICK_S)
        with self._lock:
            if self._closed:
                self._close_channels()
                return False
            for key, _ in events:
                if key.data is None:
                    self._drain_wake()
                elif key.data not in self._workers:
                    continue  # removed earlier in this round
                elif key.fileobj is key.data.socket:
                    self._read(key.data)
                elif not key.data.drain_output():
                    self._selector.unregister(key.fileobj)
            self._check_deadlines()
            if self._queue and len(self._workers) < self.num_workers:
                self._spawn()
        return True

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_out.recv(4096)

    def _spawn(self) -> None:
        wanted = min(self.num_workers - len(self._workers), len(self._queue) - len(self._starting))
        for _ in range(max(0, wanted)):
            worker = WorkerProcess()
            self._workers[worker] = None
            self._starting[worker] = Deadline(_START_TIMEOUT_S)
            self._selector.register(worker.socket, selectors.EVENT_READ, worker)
            self._selector.register(worker.output_fd, selectors.EVENT_READ, worker)

    def _read(self, worker: WorkerProcess) -> None:
        frames, alive = worker.receive()
        for frame in frames:
            self._handle(worker, frame)
        if not alive:
            self._lost(worker)

    def _handle(self, worker: WorkerProcess, frame: bytes) -> None:
        kind = frame[:1]
        if kind == b"R":
            self._starting.pop(worker, None)
            self._failed_starts = 0
            self._next(worker)
            return
        call = self._workers[worker]
        if call is None:
            return
        if kind == b"L":
            call.loading = False
            call.deadline = Deadline(call.timeout_s)
            return
        if call.loading:  # an answer before "loaded": the worker does not hold this function
            worker.forget(call.digest)
        self._next(worker)
        call.resolve(frame)

    def _lost(self, worker: WorkerProcess) -> None:
        """A worker ended by itself."""
        starting = self._starting.pop(worker, None) is not None
        status = worker.exit_status()
        call = self._remove(worker)
        self.num_crashed += 1
        tail = f" Its last output:\n{worker.output_tail}" if worker.output_tail else " It printed nothing."
        if call is not None and not call.tried_before:
            _log.warning("The worker process that ran %s died (%s); it is called once more.%s", call.name, status, tail)
            call.tried_before = True
            self._queue.appendleft(call)
        elif call is not None:
            call.resolve(WorkerDied(f"The worker process that ran {call.name} died ({status}), the second one.{tail}"))
        elif starting:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                self._fail_queue(f"Worker processes die as they start ({status}).{tail}")

    def _check_deadlines(self) -> None:
        for worker, call in list(self._workers.items()):
            starting = self._starting.get(worker)
            if call is not None and call.deadline is not None and call.deadline.expired:
                self._remove(worker)
                self.num_killed += 1
                what = "was not loaded" if call.loading else "did not answer"
                limit = max(_START_TIMEOUT_S, call.timeout_s) if call.loading else call.timeout_s
                call.resolve(DeadlineExceeded(f"{call.name} {what} in {limit:g} s; its process was killed."))
            elif call is None and starting is not None and starting.expired:
                self._starting.pop(worker)
                self._remove(worker)
                self._fail_queue(f"A worker process did not start in {_START_TIMEOUT_S:g} s.")

    def _remove(self, worker: WorkerProcess) -> _Call | None:
        for channel in (worker.socket, worker.output_fd):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(channel)
        if worker in self._idle:
            self._idle.remove(worker)
        worker.kill()
        return self._workers.pop(worker, None)

    def _fail_queue(self, message: str) -> None:
        self._failed_starts = 0
        calls, self._queue = list(self._queue), deque()
        for call in calls:
            call.resolve(WorkerDied(message))
        self._admit()

    # -- pickling -------------------------------------------------------------------------------

    def _pickled(self, function: Callable[..., object]) -> tuple[bytes, bytes]:
        """Digest and pickle of a function; of plain functions the first pickle is kept."""
        if not isinstance(function, (types.FunctionType, types.BuiltinFunctionType, type)):
            return pickle_function(function)
        with self._lock:
            found = self._functions.get(function)
            if found is None:
                found = self._functions[function] = pickle_function(function)
                if len(self._functions) > 256:
                    self._functions.popitem(last=False)
        return found


def _serve(pool_ref: weakref.ref[ProcessPool]) -> None:
    """Body of the service thread; it ends with the pool, or when nobody holds the pool any more."""
    while True:
        pool = pool_ref()
        if pool is None:
            return
        try:
            if not pool._serve_once():
                return
        except Exception:
            _log.exception("the process pool failed and is shut down")
            pool.shutdown()
            return
        del pool


def _shutdown_at_exit(pool_ref: weakref.ref[ProcessPool]) -> None:
    pool = pool_ref()
    if pool is not None:
        pool.shutdown()
