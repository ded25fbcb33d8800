"""Daemon threads with a deadline, for functions that cannot be sent to another process."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from attrs import define

from nemo_rl_core.errors import DeadlineExceeded

__all__ = ["ThreadCalls"]

_log = logging.getLogger(__name__)


@define(eq=False)
class _Call:
    function: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    started: asyncio.Future[None]
    answer: asyncio.Future[Any]
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
        self._queue: queue.SimpleQueue[_Call] = queue.SimpleQueue()

    async def run(self, function: Callable[[], Any], *, timeout_s: float, name: str) -> Any:
        """Call `function()`; the clock runs from when a thread takes it.

        Raises:
            DeadlineExceeded: It did not answer in `timeout_s`.
            Exception: Whatever the function raised.
        """
        loop = asyncio.get_running_loop()
        call = _Call(function, loop, loop.create_future(), loop.create_future())
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
        threading.Thread(target=self._work, name="nemo-rl-reward", daemon=True).start()

    def _abandon(self, call: _Call) -> None:
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
            _resolve(call, call.started, None, None)
            try:
                value, error = call.function(), None
            except BaseException as raised:
                value, error = None, raised if isinstance(raised, Exception) else RuntimeError(repr(raised))
            with self._lock:
                if call.abandoned:
                    return  # another thread has taken this one's place
            _resolve(call, call.answer, value, error)


def _resolve(call: _Call, future: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    def settle() -> None:
        if future.done():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    try:
        call.loop.call_soon_threadsafe(settle)
    except RuntimeError:
        _log.debug("nobody waits for a reward thread any more")
