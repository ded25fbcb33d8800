"""Seconds per stage of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["StageTimers"]


class StageTimers:
    """Adds up seconds by stage name; stages may nest and repeat.

    Args:
        now: The time, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block as `stage`."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + self._now() - start

    def collect(self) -> dict[str, float]:
        """`timing/<stage>` in seconds since the last call."""
        collected = {f"timing/{stage}": seconds for stage, seconds in self._seconds.items()}
        self._seconds.clear()
        return collected
