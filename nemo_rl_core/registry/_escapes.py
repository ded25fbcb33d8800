"""Exceptions that may not leave a plugin as they are.

Some would read as success (StopIteration ends a loop, SystemExit(0) a process with status 0), some would end what
belongs to others (an event loop, a worker), some cannot be told (their text raises). `PluginCall` turns each into a
`PluginFailed` that names the plugin. What comes from outside (Ctrl-C, a cancellation that the framework sent) passes.
"""

from __future__ import annotations

import opcode
import signal
import sys
from types import TracebackType

from nemo_rl_core.errors import NemoRLError, RunInterrupted

__all__ = ["comes_from_outside", "is_escape", "text_of", "what_escaped"]

_STOPS = (StopIteration, StopAsyncIteration)
_RAISE = opcode.opmap["RAISE_VARARGS"]
_OWN_MODULES = ("nemo_rl_core", "asyncio", "concurrent")


def text_of(error: BaseException) -> str:
    """The text of an exception, also of one whose `__str__` raises."""
    try:
        return str(error)
    except BaseException as second:
        return f"(its text cannot be shown: __str__ raised {type(second).__name__})"


def is_escape(error: BaseException) -> bool:
    """Whether an exception that a plugin raised must not go on as it is."""
    if isinstance(error, NemoRLError):
        return False
    if isinstance(error, Exception) and not isinstance(error, _STOPS):
        return not _has_text(error)
    return not comes_from_outside(error)


def comes_from_outside(error: BaseException) -> bool:
    """Whether it was sent into the code that it passes through, and is not that code's own.

    That is Ctrl-C and what handlers of other signals raise, the cancellation of a task, and the end of a generator or
    coroutine that is closed.
    """
    if isinstance(error, RunInterrupted) or _passes_signal_handler(error):
        return True
    if not isinstance(error, Exception) and type(error).__module__.partition(".")[0] == "nemo_rl_core":
        return True  # such as the kill of a simulated process
    if _is_cancellation(error):
        return _in_task()
    return isinstance(error, KeyboardInterrupt | GeneratorExit) and not _was_raised_by_statement(error)


def what_escaped(error: BaseException) -> str:
    """What the plugin did, and what it would have been taken for."""
    name = type(error).__name__
    if isinstance(error, SystemExit):
        return f"called sys.exit({error.code!r}), which would have ended the whole process. It should raise an error"
    if isinstance(error, _STOPS):
        return (
            f"raised {name}, which would have been taken for the end of the data. "
            "A next() without a default does so; catch it there"
        )
    if _is_cancellation(error):
        return f"raised {name} though nobody cancelled it. It should raise an error"
    if isinstance(error, KeyboardInterrupt | GeneratorExit):
        return f"raised {name}, which only the interpreter may do. It should raise an error"
    if isinstance(error, Exception):
        return f"raised {name} {text_of(error)}. Its class needs a __str__ that works"
    return f"raised {name}: {text_of(error)}. It is no Exception, so nobody could handle it; derive it from Exception"


def _has_text(error: BaseException) -> bool:
    try:
        str(error)
    except BaseException:
        return False
    return True


def _is_cancellation(error: BaseException) -> bool:
    asyncio = sys.modules.get("asyncio")  # importing it takes longer than `nemo-rl --help`
    return asyncio is not None and isinstance(error, asyncio.CancelledError)


def _in_task() -> bool:
    try:
        return sys.modules["asyncio"].current_task() is not None
    except RuntimeError:  # no event loop runs in this thread
        return False


def _was_raised_by_statement(error: BaseException) -> bool:
    """Whether a `raise` of somebody else's code made it; what is sent arrives between any two instructions."""
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_lasti < 0:
        return False
    module = str(last.tb_frame.f_globals.get("__name__"))
    return module.partition(".")[0] not in _OWN_MODULES and last.tb_frame.f_code.co_code[last.tb_lasti] == _RAISE


def _passes_signal_handler(error: BaseException) -> bool:
    """Whether a handler that is installed now raised it, amid whatever code the signal met."""
    handlers = {getattr(signal.getsignal(number), "__code__", None) for number in signal.valid_signals()}
    frames: TracebackType | None = error.__traceback__
    while frames is not None:
        if frames.tb_frame.f_code in handlers:
            return True
        frames = frames.tb_next
    return False
