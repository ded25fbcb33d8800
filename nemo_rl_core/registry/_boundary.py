"""What may not leave a plugin's code: exceptions that mean something to whoever called it.

`StopIteration` ends a loop of its caller, `SystemExit` the process, a cancellation a task, and an exception that is no
`Exception` passes every handler. Raised by a plugin, each of them is that plugin's error and nothing else.
"""

from __future__ import annotations

import asyncio

from nemo_rl_core.errors import describe
from nemo_rl_core.machine.interrupts import was_interrupted

__all__ = ["escape"]


def escape(error: BaseException) -> str | None:
    """What a plugin did by raising `error`, if that must not leave its code; None for an ordinary exception.

    None as well for what is not the plugin's: Ctrl-C, and a cancellation that somebody asked for.
    """
    if isinstance(error, StopIteration | StopAsyncIteration):
        return f"raised {type(error).__name__}, which would end a loop of its caller"
    if isinstance(error, Exception):
        return None
    if isinstance(error, SystemExit):
        return f"called sys.exit({error.code!r})"
    if isinstance(error, KeyboardInterrupt):
        return None if was_interrupted() else "raised KeyboardInterrupt, though nobody interrupted it"
    if isinstance(error, asyncio.CancelledError):
        return None if _is_cancelled() else "raised CancelledError, though nobody cancelled it"
    return f"raised {describe(error)}, which is no Exception"


def _is_cancelled() -> bool:
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs here
        return False
    return task is not None and task.cancelling() > 0
