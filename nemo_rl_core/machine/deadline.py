"""One deadline for all the waits of one piece of work, and the error that names what was waited for."""

from __future__ import annotations

import time

from nemo_rl_core.errors import DeadlineExceeded

__all__ = ["Deadline"]


class Deadline:
    """A moment, of this process's clock, by which some work must be through.

    Args:
        seconds: From now.
        what: The work, for the message ("Refit to weight version 3").
        hint: What to do if it passes, for the message.
    """

    __slots__ = ("_end", "_hint", "_what", "seconds")

    def __init__(self, seconds: float, *, what: str = "A wait", hint: str = "") -> None:
        self.seconds = seconds
        """What was allowed in all."""
        self._end = time.monotonic() + seconds
        self._what = what
        self._hint = hint

    def remaining(self) -> float:
        """Seconds left, 0 at least: the timeout of the next wait."""
        return max(0.0, self._end - time.monotonic())

    @property
    def expired(self) -> bool:
        """Whether the moment has passed."""
        return time.monotonic() >= self._end

    def shorten(self, seconds: float) -> None:
        """End in `seconds` from now if that is sooner: the grace time after a first failure."""
        self._end = min(self._end, time.monotonic() + seconds)

    def exceeded(self, waiting_for: str) -> DeadlineExceeded:
        """The error to raise, which names who was waited for."""
        text = f"{self._what} passed its deadline of {self.seconds:g} s while waiting for {waiting_for}."
        return DeadlineExceeded(f"{text} {self._hint}".rstrip())

    def check(self, waiting_for: str) -> None:
        """Raise if the moment has passed.

        Raises:
            DeadlineExceeded: Names who was waited for.
        """
        if self.expired:
            raise self.exceeded(waiting_for)
