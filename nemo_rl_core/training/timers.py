"""Seconds per stage of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["StageTimers"]


class StageTimers:
    """Adds up wall-clock seconds by stage name; stages may nest and repeat."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block as `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start

    def collect(self) -> dict[str, float]:
        """`timing/<stage>` in seconds since the last call."""
        collected = {f"timing/{stage}": seconds for stage, seconds in self._seconds.items()}
        self._seconds.clear()
        return collected
