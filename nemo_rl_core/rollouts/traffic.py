"""Requests on their way to and from the generation backend: counted, timed, and held back during a weight update."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nemo_rl_core.errors import DeadlineExceeded
from nemo_rl_core.machine.clock import Clock, SystemClock
from nemo_rl_core.machine.threads import settle_soon

__all__ = ["GenerationTraffic"]

_ASK_EVERY_S = 1.0


class GenerationTraffic:
    """Every request passes through here: `enter` in the event loop, then `leave`. Thread-safe.

    Args:
        clock: Of the idle time and the deadlines; None is the machine's.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._changed = self._clock.condition()
        self._count = 0
        self._held = False
        self._queue: list[asyncio.Future[None]] = []
        self._idle_since: float | None = self._clock.now()
        self._idle_s = self._stopping_s = 0.0

    @property
    def count(self) -> int:
        """Requests that the engine has, and those held back."""
        return self._count + len(self._queue)

    async def enter(self) -> None:
        """Pass on to the engine; waits while requests are held back."""
        while True:
            with self._changed:
                if not self._held:
                    self._begin()
                    return
                entry: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._queue.append(entry)
            try:
                await entry
            except asyncio.CancelledError:
                with self._changed:
                    if entry in self._queue:
                        self._queue.remove(entry)
                raise

    def leave(self) -> None:
        """The engine has answered, or the request was given up."""
        with self._changed:
            self._count -= 1
            if self._count == 0:
                self._idle_since = self._clock.now()
                self._changed.notify_all()

    @contextmanager
    def stopped(self, timeout_s: float, *, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """No request is with the engine inside the block; those that come wait for its end.

        Args:
            timeout_s: How long to wait for those that it has.
            unless: Says that nobody works on them, so that they need not be waited for; asked once a second.

        Raises:
            DeadlineExceeded: The requests that the engine had were not answered in `timeout_s`.
        """
        try:
            self._stop(timeout_s, unless)
            yield
        finally:
            self._release()

    def take_idle_s(self) -> float:
        """Seconds without any request at the engine, since the last call."""
        with self._changed:
            now = self._clock.now()
            idle, self._idle_s = self._idle_s, 0.0
            if self._idle_since is not None:
                idle += now - self._idle_since
                self._idle_since = now
            return idle

    def take_stopping_s(self) -> float:
        """Seconds for which `stopped` waited for the engine's requests, since the last call."""
        with self._changed:
            seconds, self._stopping_s = self._stopping_s, 0.0
            return seconds

    def reset(self) -> None:
        """Forget every request: the event loop that they belong to is gone."""
        with self._changed:
            self._queue.clear()
            if self._count:
                self._count, self._idle_since = 0, self._clock.now()
                self._changed.notify_all()

    def _stop(self, timeout_s: float, unless: Callable[[], bool]) -> None:
        began = self._clock.now()
        with self._changed:
            self._held = True
            try:
                while self._count and not unless():
                    left = began + timeout_s - self._clock.now()
                    if left <= 0:
                        raise DeadlineExceeded(
                            f"Before the weight update the engine should finish its requests; {self._count} were not "
                            f"answered in {timeout_s:g} s. Shorten the completions, raise "
                            "rollouts.generation_timeout_s, or set rollouts.weight_updates to in_flight."
                        )
                    self._changed.wait(min(left, _ASK_EVERY_S))
            finally:
                self._stopping_s += self._clock.now() - began

    def _begin(self) -> None:
        self._count += 1
        if self._idle_since is not None:
            self._idle_s += self._clock.now() - self._idle_since
            self._idle_since = None

    def _release(self) -> None:
        with self._changed:
            self._held = False
            waiting, self._queue = self._queue, []
        for future in waiting:
            settle_soon(future, None)
