"""Virtual time: an event loop that never waits, and a clock on it for the thread that drives it.

The trainer's code is not changed and not awaited: when it waits on a condition of the clock, or sleeps, the loop runs
the rollouts until then. All in one thread, so that a schedule is the same in every run.
"""

from __future__ import annotations

import asyncio
import math
import threading
from asyncio import events
from collections.abc import Callable
from types import TracebackType
from typing import Any

from nemo_rl_core.errors import DeadlineExceeded

__all__ = ["SimulatedKill", "VirtualClock", "VirtualCondition", "VirtualLoop"]


_ROUNDS_TO_END = 100
_RESOLUTION_S = 1e-9
_LONGEST_S = 1e10


class SimulatedKill(BaseException):
    """The process of the trainer has died: nothing after this runs."""


class _Idle:
    """Stands where a loop waits for sockets: time passes instead, to the next timer."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None or timeout > 0:
            self._loop.pass_time()
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop whose `time()` jumps to the next timer when nothing is ready."""

    _scheduled: list[asyncio.TimerHandle]

    def __init__(self, start: float = 0.0) -> None:
        self._virtual = start
        super().__init__()
        self._selector = _Idle(self)
        self.failure: BaseException | None = None
        """The first exception that nobody caught."""
        self.set_exception_handler(self._keep)

    def time(self) -> float:
        """Virtual seconds."""
        return self._virtual

    def pass_time(self) -> None:
        """Go to the next timer."""
        if self._scheduled:
            self._virtual = max(self._virtual, self._scheduled[0].when())
            # The loop runs timers that are due before `time() + resolution`: a sum that has to be a later time.
            self._clock_resolution = max(_RESOLUTION_S, 2 * math.ulp(self._virtual))
        if self._virtual > _LONGEST_S:
            raise DeadlineExceeded(f"The simulation passed {_LONGEST_S:g} virtual seconds without coming to its end.")

    def advance(self, until: float) -> None:
        """Run what is ready; if that is nothing, let time pass to the next timer, or to `until`."""
        timer = None if self._ready else self.call_at(until, _nothing)  # type: ignore[attr-defined]
        before = events._get_running_loop()
        self._thread_id = threading.get_ident()
        events._set_running_loop(self)
        try:
            self._run_once()  # type: ignore[attr-defined]
        finally:
            self._thread_id = None  # type: ignore[assignment]
            events._set_running_loop(before)
            if timer is not None:
                timer.cancel()
        if self.failure is not None:
            raise self.failure

    def drop(self) -> None:
        """End every task and close."""
        self.set_exception_handler(lambda loop, context: None)
        for _ in range(_ROUNDS_TO_END):
            try:
                self.advance(self._virtual)  # also starts what was only asked for
            except BaseException:  # what dies with the process is of no interest
                self.failure = None
            tasks = asyncio.all_tasks(self)
            for task in tasks:
                task.cancel()
            if not tasks and not self._ready:  # type: ignore[attr-defined]
                break
        self.close()

    def _keep(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if self.failure is None:
            self.failure = error if error is not None else RuntimeError(str(context.get("message")))

    def _process_events(self, event_list: list[Any]) -> None:
        """No sockets."""

    def _write_to_self(self) -> None:
        """Nobody sleeps who would have to be woken."""


def _nothing() -> None:
    """What a timer that only lets time pass calls."""


class VirtualClock:
    """A `Clock` on a virtual loop, for code that drives the loop by waiting.

    Args:
        loop: Where the rollouts run.
        dies_at: Virtual time at which every wait raises `SimulatedKill`.
    """

    def __init__(self, loop: VirtualLoop, *, dies_at: float = math.inf) -> None:
        self.loop = loop
        self.dies_at = dies_at

    def now(self) -> float:
        """Virtual seconds."""
        return self.loop.time()

    def condition(self) -> VirtualCondition:
        """A condition whose waits run the loop."""
        return VirtualCondition(self)

    def sleep(self, seconds: float) -> None:
        """Let time pass, and what else happens in it."""
        self.run(self.now() + seconds, lambda: False)

    def run(self, deadline: float, happened: Callable[[], bool]) -> bool:
        """Run the loop until `happened()`; False if the deadline came first."""
        loop = self.loop
        while not happened():
            if loop.time() >= deadline:
                return False
            loop.advance(min(deadline, self.dies_at))
            if loop.time() >= self.dies_at:
                raise SimulatedKill
        return True


class VirtualCondition:
    """A `Condition` of a virtual clock; there is one thread, so that its lock needs nothing."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._told = 0

    def __enter__(self) -> VirtualCondition:
        """Nothing to take."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to give back."""

    def wait(self, timeout: float | None = None) -> bool:
        """Run the loop until `notify_all`, for `timeout` virtual seconds at most."""
        before = self._told
        deadline = math.inf if timeout is None else self._clock.now() + timeout
        return self._clock.run(deadline, lambda: self._told != before)

    def notify_all(self) -> None:
        """Wake who waits."""
        self._told += 1
