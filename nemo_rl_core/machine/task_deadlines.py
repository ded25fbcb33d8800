"""Deadlines of thousands of waits with one timer."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from typing import Any, TypeVar

__all__ = ["DeadlineWatch", "TaskDeadline"]

_T = TypeVar("_T")
_TICK_S = 0.1
_LONGEST_TICK_S = 10.0


class TaskDeadline:
    """The deadline of whatever one task now waits for."""

    __slots__ = ("_cancelling", "_now", "_task", "expired", "when")

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task
        self._now = task.get_loop().time
        self._cancelling = 0
        self.when = math.inf
        """Event-loop time at which the wait is cut off; infinity is never."""
        self.expired = False

    async def wait(self, awaitable: Awaitable[_T], limit_s: float) -> _T:
        """Await, for `limit_s` seconds at most (and up to a tick of the watch more).

        Raises:
            TimeoutError: The time is over; what was awaited has been cancelled.
        """
        self._cancelling = self._task.cancelling()
        self.when = self._now() + limit_s
        try:
            result = await awaitable
        except BaseException as error:
            self.when = math.inf
            if self._was_cut() and not self._cancelled_from_outside(error):
                raise TimeoutError from error
            raise
        self.when = math.inf
        if self._was_cut():  # what was awaited swallowed the cancellation
            raise TimeoutError
        return result

    def _was_cut(self) -> bool:
        """Whether the watch ended this wait; takes its cancellation back."""
        if not self.expired:
            return False
        self.expired = False
        self._task.uncancel()
        return True

    def _cancelled_from_outside(self, error: BaseException) -> bool:
        return isinstance(error, asyncio.CancelledError) and self._task.cancelling() > self._cancelling

    def pause(self) -> float:
        """Stop the clock; returns the seconds left (infinity if none runs) for `resume`."""
        left = self.when - self._now()
        self.when = math.inf
        return left

    def resume(self, left_s: float) -> None:
        """Let the clock run on, unless the wait is over or another one has begun meanwhile."""
        if left_s != math.inf and self.when == math.inf and not self.expired:
            self.when = self._now() + left_s

    def cut(self) -> None:
        """End the wait now."""
        self.expired = True
        self.when = math.inf
        self._task.cancel()


class DeadlineWatch:
    """Cuts off the waits of registered deadlines; belongs to one event loop.

    Args:
        shortest_s: The shortest of these waits; each is cut off late by at most a hundredth of it (or 0.1 s).
    """

    def __init__(self, shortest_s: float = 0.0) -> None:
        self._tick_s = min(max(shortest_s / 100, _TICK_S), _LONGEST_TICK_S)
        self._deadlines: set[TaskDeadline] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, deadline: TaskDeadline) -> None:
        """Watch this deadline."""
        self._deadlines.add(deadline)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._tick_s, self._look)

    def remove(self, deadline: TaskDeadline) -> None:
        """Stop watching this deadline."""
        self._deadlines.discard(deadline)

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        for deadline in [d for d in self._deadlines if d.when <= now]:
            deadline.cut()
        self._timer = None
        if self._deadlines:
            self._timer = asyncio.get_running_loop().call_later(self._tick_s, self._look)
