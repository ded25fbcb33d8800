"""Import of a plugin's code: protects standard output and the state of the process, and names a slow one."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
from collections.abc import Iterator

from nemo_rl_core.registry.discovery._side_effects import ProcessState

__all__ = ["SLOW_VARIABLE", "importing"]

SLOW_VARIABLE = "NEMO_RL_SLOW_IMPORT_S"

logger = logging.getLogger("nemo_rl_core.registry")


@contextlib.contextmanager
def importing(what: str) -> Iterator[None]:
    """Around an import of a plugin's code.

    What it prints goes to standard error, and one warning says who printed: standard output belongs to the
    command's own output. An import that takes longer than NEMO_RL_SLOW_IMPORT_S seconds (10) is named in one
    warning while it still runs, so that a user knows what a start waits for. What it changes for everyone in the
    process (see `_side_effects`) is put back where that is safe, and named in one warning.

    Args:
        what: The component, with its distribution and version, for messages.
    """
    limit = _limit_s()
    watch = threading.Timer(limit, logger.warning, (_SLOW, what, limit, SLOW_VARIABLE))
    watch.daemon = True
    printed = _Printed()
    watch.start()
    state = ProcessState()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        changed = state.undo()
        watch.cancel()
        if changed:
            logger.warning(_CHANGED, what, "; ".join(changed))
        if printed.first:
            logger.warning(_PRINTED, what, printed.first.strip()[:80])


_SLOW = (
    "The %s is still being imported after %g s. Its author can make imports of heavy libraries lazy; what loads "
    "large libraries for good reason can be given more time (%s)."
)
_CHANGED = (
    "The %s changed what the whole process shares while it was imported: %s. Its author should leave that to the user, "
    "or do it where the plugin runs."
)
_PRINTED = (
    "The %s printed to standard output while it was imported (%r ...); it went to standard error. "
    "Its author should use logging."
)


def _limit_s() -> float:
    try:
        return float(os.environ.get(SLOW_VARIABLE, ""))
    except ValueError:
        return 10.0


class _Printed(io.TextIOBase):
    """Passes text on to standard error and remembers the first line."""

    def __init__(self) -> None:
        self.first = ""

    def write(self, text: str) -> int:
        """Take text."""
        if not self.first.strip():
            self.first += text
        return sys.stderr.write(text)

    def flush(self) -> None:
        """Pass on."""
        sys.stderr.flush()
