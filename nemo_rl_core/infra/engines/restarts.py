"""Starts and restarts of engine processes, up to the allowed number."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from nemo_rl_core.infra.engines.link import EngineLink

__all__ = ["EngineRestarts"]

_log = logging.getLogger(__name__)

_BETWEEN_STARTS_S = 1.0
"""Before a start that failed is repeated: what the dead process held (a device's memory) may come free late."""


class EngineRestarts:
    """How an engine is started, and how often one may be started again.

    Args:
        launch: Starts engine number i and connects to it; None where nobody starts one again.
        most: Restarts allowed, of all engines together.
        changed: The condition of the engines, under which all but `start` are called.

    Attributes:
        num: Restarts so far.
    """

    def __init__(self, launch: Callable[[int], EngineLink] | None, most: int, changed: threading.Condition) -> None:
        self.launch = launch
        self.most = most
        self.num = 0
        self._changed = changed

    @property
    def is_left(self) -> bool:
        """Whether one more is allowed."""
        return self.launch is not None and self.num < self.most

    def spend(self, reason: BaseException, what_follows: str = "") -> None:
        """Count one and tell why."""
        self.num += 1
        _log.warning("%s Starting it again (%d of %d)%s.", reason, self.num, self.most, what_follows)

    def start(self, index: int, *, is_wanted: Callable[[], bool]) -> EngineLink | None:
        """Start engine `index`; a start that fails counts as a restart and is repeated.

        Returns:
            Its link; None if it is not wanted any more.

        Raises:
            Exception: Of the start that failed, when no restart is left.
        """
        assert self.launch is not None
        while True:
            try:
                return self.launch(index)
            except Exception as error:
                with self._changed:
                    if self._changed.wait_for(lambda: not is_wanted(), _BETWEEN_STARTS_S):
                        return None
                    if not self.is_left:
                        raise
                    self.spend(error)
