"""Error boundary of the command line: turns an exception into a message and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from nemo_rl_core.errors import NemoRLError
from nemo_rl_core.registry.discovery._index import DEBUG_VARIABLE, DENY_VARIABLE

__all__ = ["RootCommand", "run", "switch_on_debug"]

UNEXPECTED, INTERRUPTED = 70, 130


class RootCommand(Protocol):
    """The root of a command line, as typer makes it."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *, standalone_mode: bool) -> object:
        """Run the command that the arguments name and return what it returns."""
        ...


def run(argv: Sequence[str] | None, command: Callable[[], RootCommand]) -> int:
    """Run a command; see `nemo_rl_core.cli.main`.

    Args:
        argv: Arguments after the program's name; None takes those of the process.
        command: Makes the root command.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `module:attr` of the user's folder; last, so that it shadows nothing
    try:
        result = command().main(args=None if argv is None else list(argv), prog_name="nemo-rl", standalone_mode=False)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:
        _drop_stdout()
        return 1
    except NemoRLError as error:
        return _known(error)
    except SystemExit as error:
        return _left(error)
    except Exception as error:
        return _from_parser(error)
    except BaseException as error:  # whatever a plugin raised: no command ends without a status of ours
        return _unexpected(error)
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def switch_on_debug(wanted: bool) -> None:
    """Callback of `--debug`: kept in the environment, so that it reaches worker processes."""
    if wanted:
        import logging

        os.environ[DEBUG_VARIABLE] = "1"
        logging.getLogger("nemo_rl_core.debug").setLevel(logging.DEBUG)


def _debug() -> bool:
    return bool(os.environ.get(DEBUG_VARIABLE))


def _say(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


def _trace(error: BaseException, status: int) -> int:
    import traceback

    traceback.print_exception(error)
    return status


def _known(error: NemoRLError) -> int:
    if _debug():
        return _trace(error, error.exit_code)
    more = "\n(nemo-rl --debug ... shows the traceback)" if error.__cause__ is not None else ""
    return _say(f"error: {error}{more}", error.exit_code)


def _left(error: SystemExit) -> int:
    """A command of a plugin may end itself with a status; whatever else does so must not read as success."""
    from nemo_rl_core.registry._trace import provider_at_fault

    at_fault = provider_at_fault(error)
    if at_fault is None or at_fault[0].kind != "commands":
        return _unexpected(error)
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    return _say(str(error.code), 1)


def _from_parser(error: Exception) -> int:
    """Exceptions of the command-line library, told by what they have: it comes in two packages."""
    name, status, show = type(error).__name__, getattr(error, "exit_code", None), getattr(error, "show", None)
    if name == "Abort":
        return _say("interrupted", INTERRUPTED)
    if name == "Exit" and isinstance(status, int):
        return status
    if isinstance(status, int) and callable(show):
        show()
        return status
    return _unexpected(error)


def _unexpected(error: BaseException) -> int:
    if _debug():
        return _trace(error, UNEXPECTED)
    import tempfile
    import traceback

    from nemo_rl_core.registry._escapes import text_of

    text = "".join(traceback.format_exception(error))
    origin, plugin = _who(error)
    message = text_of(error).removeprefix(f"{origin}: ")
    if origin is None:
        lines = [f"error: unexpected {type(error).__name__}: {message}", "This is a bug of nemo-rl."]
    else:
        lines = [f"error: {origin}: {type(error).__name__}: {message}"]
        if plugin:
            lines.append(
                f"Upgrade it (pip install -U {plugin}), choose another, or disable it: {DENY_VARIABLE}={plugin}"
            )
    try:
        handle, path = tempfile.mkstemp(prefix="nemo-rl-error-", suffix=".txt", text=True)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"{' '.join(sys.argv)}\n\n{text}")
        report = "" if origin and not plugin else f"; please report it{_tracker(plugin)}"
        lines.append(f"The traceback is in {path} (nemo-rl --debug ... shows it){report}.")
    except OSError:  # the disk may be what failed
        lines.append(text)
    return _say("\n".join(lines), UNEXPECTED)


def _who(error: BaseException) -> tuple[str | None, str | None]:
    """Who raised it, and the distribution of that plugin; None of the framework's own."""
    from nemo_rl_core.registry._trace import blamed, provider_at_fault

    found = blamed(error)
    if found is not None:
        return found
    at_fault = provider_at_fault(error)
    if at_fault is None:
        return None, None
    provider, call = at_fault
    return provider.at(call), provider.distribution


def _tracker(plugin: str | None) -> str:
    """Where to report: the issue tracker of the distribution's metadata, if it names one."""
    from nemo_rl_core.registry import get_registry

    dist = get_registry().distribution(plugin or "nemo-rl-core")
    for line in ((dist.read("METADATA") if dist else None) or "").splitlines():
        key, _, value = line.partition(":")
        label, _, address = value.partition(",")
        if key == "Project-URL" and label.strip().lower() in ("issues", "issue tracker", "bug tracker"):
            return f" at {address.strip()}"
    return " to its authors" if plugin else " on the project's issue tracker"


def _drop_stdout() -> None:
    """The reader of our output has gone (`| head`): nothing more can be flushed at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
