"""Measurement of how long a coroutine blocks its event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextvars import Context
from pathlib import Path
from typing import TypeVarTuple, Unpack

__all__ = ["longest_block"]

_Ts = TypeVarTuple("_Ts")
_REPEATS = 6
_WAITED = Path("/proc/thread-self/schedstat")


def longest_block(work: Callable[[], Coroutine[object, object, object]], *, limit_s: float) -> float:
    """Run the coroutine that `work` makes and return the seconds of its longest stretch between two waits.

    Another program may take the processor away in any stretch. So time in which the thread was ready and did not run
    is not counted, where the system tells; and a run with a stretch above `limit_s` is repeated: a block comes again
    in each, a disturbance does not. The shortest of the runs' longest stretches is the answer.
    """
    shortest = float("inf")
    for _ in range(_REPEATS):
        loops: list[_TimedLoop] = []

        def timed_loop(loops: list[_TimedLoop] = loops) -> _TimedLoop:
            loops.append(_TimedLoop())
            return loops[0]

        with asyncio.Runner(loop_factory=timed_loop) as runner:
            runner.run(work())
        shortest = min(shortest, loops[0].longest_s)
        if shortest <= limit_s:
            break
    return shortest


class _TimedLoop(asyncio.SelectorEventLoop):
    """An event loop that measures every call it makes: each is a stretch in which nothing else of it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.longest_s = 0.0

    def call_soon(
        self, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Schedule the callback as the base class does, and measure its run."""
        return super().call_soon(self._measured(callback), *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Schedule the callback as the base class does, and measure its run."""
        return super().call_at(when, self._measured(callback), *args, context=context)

    def _measured(self, callback: Callable[[Unpack[_Ts]], object]) -> Callable[[Unpack[_Ts]], object]:
        def call(*args: *_Ts) -> object:
            started, waited = time.monotonic(), _ready_but_not_run_s()
            try:
                return callback(*args)
            finally:
                taken = time.monotonic() - started - (_ready_but_not_run_s() - waited)
                self.longest_s = max(self.longest_s, taken)

        return call


def _ready_but_not_run_s() -> float:
    """Seconds so far in which this thread was ready and another had the processor; 0 if the system does not tell."""
    try:
        return int(_WAITED.read_text().split()[1]) * 1e-9
    except (OSError, IndexError, ValueError):
        return 0.0
