"""Daemon threads that answer through a future and are abandoned at a deadline."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import queue
import select
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar, TypeVarTuple, Unpack

from attrs import define

from nemo_rl_core.errors import DeadlineExceeded

__all__ = ["ThreadCalls", "daemon", "in_thread", "settle", "settle_soon", "watch_parent"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")
_LOOK_S = 1.0
"""Between two looks at the parent, where the system cannot tell of its end."""


def daemon(target: Callable[[Unpack[_Ts]], object], /, *args: *_Ts, name: str) -> threading.Thread:
    """Start a thread that does not keep the interpreter from ending."""
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    thread.start()
    return thread


def in_thread(work: Callable[[], _T], *, name: str) -> concurrent.futures.Future[_T]:
    """Run `work` in a daemon thread; the future has its result or what it raised.

    The wait for the future has the deadline; a thread that misses it goes on and its answer is dropped.
    """
    future: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # handed to whoever waits
            future.set_exception(error)
        else:
            future.set_result(result)

    daemon(run, name=name)
    return future


def settle(future: asyncio.Future[Any], value: object, error: BaseException | None = None) -> None:
    """Give a future its result or error unless it has one or was cancelled; called in the loop's own thread."""
    if future.done():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


def settle_soon(future: asyncio.Future[Any], value: object, error: BaseException | None = None) -> bool:
    """`settle` a future from any thread; return whether its loop still runs, so that somebody may wait for it."""
    try:
        future.get_loop().call_soon_threadsafe(settle, future, value, error)
    except RuntimeError:  # the loop has ended
        return False
    return True


def watch_parent(on_gone: Callable[[], object], *, name: str) -> None:
    """Call `on_gone` in a thread when the process that started this one has ended, however it ended."""
    daemon(_watch, os.getppid(), on_gone, name=name)


def _watch(parent: int, on_gone: Callable[[], object]) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not on every system; or it is gone already
        descriptor = os.pidfd_open(parent)
        try:
            if os.getppid() == parent:  # else the number may be another process's by now
                select.select([descriptor], [], [])
        finally:
            os.close(descriptor)
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    on_gone()


@define(eq=False)
class _Call(Generic[_T]):
    function: Callable[[], _T]
    started: asyncio.Future[None]
    answer: asyncio.Future[_T]
    abandoned: bool = False


class ThreadCalls:
    """Runs functions in daemon threads, `num_threads` at a time.

    A thread cannot be killed: at its deadline a call is abandoned with its thread, and another thread
    takes its place. Abandoned threads do not keep the interpreter from ending.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._num_live = 0
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Call[Any]] = queue.SimpleQueue()

    async def run(self, function: Callable[[], _T], *, timeout_s: float, name: str) -> _T:
        """Call `function()`; the clock runs from when a thread takes it.

        Raises:
            DeadlineExceeded: It did not answer in `timeout_s`.
            Exception: Whatever the function raised.
        """
        loop = asyncio.get_running_loop()
        call: _Call[_T] = _Call(function, loop.create_future(), loop.create_future())
        self._queue.put(call)
        self._ensure_threads()
        try:
            await call.started
            async with asyncio.timeout(timeout_s) as deadline:
                return await call.answer
        except TimeoutError as error:
            if not deadline.expired():
                raise
            self._abandon(call)
            raise DeadlineExceeded(
                f"{name} did not answer in {timeout_s:g} s; its thread cannot be killed and was abandoned."
            ) from error
        except asyncio.CancelledError:
            self._abandon(call)
            raise

    def _ensure_threads(self) -> None:
        with self._lock:
            if self._num_live >= self._num_threads:
                return
            self._num_live += 1
        daemon(self._work, name="nemo-rl-reward")

    def _abandon(self, call: _Call[Any]) -> None:
        with self._lock:
            if call.abandoned:
                return
            call.abandoned = True
            if call.started.done():
                self._num_live -= 1
        self._ensure_threads()

    def _work(self) -> None:
        while True:
            call = self._queue.get()
            with self._lock:
                skip = call.abandoned
            if skip:
                continue
            settle_soon(call.started, None)
            try:
                value, error = call.function(), None
            except BaseException as raised:
                value, error = None, raised if isinstance(raised, Exception) else RuntimeError(repr(raised))
            with self._lock:
                if call.abandoned:
                    return  # another thread has taken this one's place
            if not settle_soon(call.answer, value, error):
                _log.debug("nobody waits for a reward thread any more")
