"""Clock and conditions of a run: the one place that a simulation replaces."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Protocol

__all__ = ["Clock", "Condition", "SystemClock"]


class Condition(Protocol):
    """A lock with a wait for changes, as `threading.Condition`."""

    def __enter__(self) -> object:
        """Take the lock."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Give it back."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Give the lock back until `notify_all`, for `timeout` seconds at most; False if nothing was told."""
        ...

    def notify_all(self) -> None:
        """Wake everyone who waits."""
        ...


class Clock(Protocol):
    """Seconds that only rise, and conditions whose waits take place on them."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        ...

    def condition(self) -> Condition:
        """A new condition."""
        ...


class SystemClock:
    """The machine's clock and its threads."""

    def now(self) -> float:
        """`time.perf_counter()`."""
        return time.perf_counter()

    def condition(self) -> Condition:
        """A `threading.Condition`."""
        return threading.Condition()
