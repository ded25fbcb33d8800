"""Ctrl-C and SIGTERM: finish or abandon the step, save, leave.

The first signal ends the run in order: a wait for rollouts is abandoned at once (nothing is lost: the step
begins again on resume), an optimizer step is finished first. The second signal is a KeyboardInterrupt.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from nemo_rl_core.errors import RunInterrupted

__all__ = ["InterruptGuard"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptGuard:
    """Context manager around a run; does nothing outside the main thread."""

    def __init__(self) -> None:
        self.requested = False
        self._may_raise = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> InterruptGuard:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def check(self) -> None:
        """Raise `RunInterrupted` if a signal came."""
        if self.requested:
            raise RunInterrupted("The run was asked to stop.")

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """A block that may be cut off by the first signal without losing anything."""
        self._may_raise = True
        try:
            self.check()
            yield
        finally:
            self._may_raise = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._may_raise:
            self._may_raise = False
            self.check()
