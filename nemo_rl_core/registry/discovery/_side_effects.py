"""What the import of a plugin changes for everyone else in the process: noticed, named, and undone where that is safe.

Safe is what nobody needs changed for a plugin to work: the working folder, signal handlers, the root logger, what
silences all warnings, defaults of torch, random states, the locale, the umask, the recursion limit. Environment
variables, `sys.path` and threads are named only: libraries rely on what they set there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

__all__ = ["ProcessState"]


class _Part(NamedTuple):
    """One thing that all code of a process shares."""

    name: str
    read: Callable[[], Any]
    restore: Callable[[Any], object] | None
    """None where a change is named only."""
    own: Callable[[Any], Any] | None = None
    """Leaves out what libraries change for themselves."""


class ProcessState:
    """The state of the process as it is now."""

    def __init__(self) -> None:
        self._before = {part.name: value for part in _PARTS for value in _read(part)}
        self._threads = set(threading.enumerate())

    def undo(self) -> list[str]:
        """Put back what was changed since and may be put back; returns each change, in words."""
        told = []
        for part in _PARTS:
            for now in _read(part):
                before = self._before.get(part.name, _UNTOUCHED.get(part.name, now))
                if part.own is not None:
                    before, now = part.own(before), part.own(now)
                if now != before:
                    done = "put back" if _restored(part, before) else "left as it is"
                    told.append(f"{part.name}{_details(before, now)} ({done})")
        new = [thread.name for thread in threading.enumerate() if thread not in self._threads]
        return [*told, f"a thread that runs on ({', '.join(new)})"] if new else told


def _details(before: Any, now: Any) -> str:
    """Which variables or entries, where there are many."""
    if isinstance(now, dict):
        changed = [str(key) for key in {**before, **now} if before.get(key) != now.get(key)]
    elif isinstance(now, list) and all(isinstance(each, str) for each in now):
        changed = [each for each in now if each not in before]
    else:
        return ""
    return f" {', '.join(changed[:4])}" if changed else ""


def _read(part: _Part) -> Iterator[Any]:
    """The value, or nothing where there is none to read."""
    with contextlib.suppress(Exception):
        yield part.read()


def _restored(part: _Part, before: object) -> bool:
    if part.restore is None:
        return False
    try:
        part.restore(before)
    except Exception:  # such as a signal handler set in another thread
        return False
    return True


# -- the parts ------------------------------------------------------------------------------------------------


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _handlers() -> dict[str, Any]:
    return {number.name: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}


def _set_handlers(before: dict[str, Any]) -> None:
    for name, handler in before.items():
        signal.signal(signal.Signals[name], handler)


def _variables() -> dict[str, str]:
    return dict(os.environ)


def _without_owned(variables: dict[str, str]) -> dict[str, str]:
    """The environment without what libraries keep there for themselves, such as TORCHINDUCTOR_CACHE_DIR."""
    owners = tuple(
        name.upper()
        for name, module in sys.modules.copy().items()
        if len(name) > 2 and "." not in name and name not in sys.stdlib_module_names and hasattr(module, "__path__")
    )
    return {name: value for name, value in variables.items() if not name.startswith(owners)}


def _path() -> list[str]:
    """`sys.path` without folders inside of installed packages, which these add for themselves."""
    roots = [entry + os.sep for entry in sys.path if entry.endswith("-packages")]
    return [entry for entry in sys.path if not any(entry.startswith(root) for root in roots)]


def _root_logger() -> tuple[int, int, list[logging.Handler]]:
    return logging.root.level, logging.root.manager.disable, list(logging.root.handlers)


def _set_root_logger(before: tuple[int, int, list[logging.Handler]]) -> None:
    level, disable, handlers = before
    logging.root.setLevel(level)
    logging.disable(disable)
    logging.root.handlers[:] = handlers


def _silencers() -> list[tuple[Any, ...]]:
    """Filters that hold for every warning, whatever its text and place: nobody may set them for all others."""
    return [f for f in warnings.filters if f[1] is None and f[2] is Warning and f[3] is None]


def _set_silencers(before: list[tuple[Any, ...]]) -> None:
    new = [f for f in _silencers() if f not in before]
    warnings.filters[:] = [f for f in warnings.filters if f not in new]  # type: ignore[index]
    with warnings.catch_warnings():  # entering and leaving has the filters read anew
        pass


def _torch() -> ModuleType:
    """Torch as it is imported; whoever has not imported it has not changed it."""
    return sys.modules["torch"]


def _numpy_random() -> ModuleType:
    return sys.modules["numpy.random"]


def _numpy_state() -> tuple[Any, ...]:
    name, keys, *rest = _numpy_random().get_state()
    return (name, keys.tobytes(), *rest)


def _set_numpy_state(before: tuple[Any, ...]) -> None:
    import numpy

    name, keys, *rest = before
    _numpy_random().set_state((name, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))


def _torch_state() -> bytes:
    return bytes(_torch().get_rng_state().numpy().tobytes())


def _set_torch_state(before: bytes) -> None:
    torch = _torch()
    torch.set_rng_state(torch.frombuffer(bytearray(before), dtype=torch.uint8))


def _locale() -> str:
    import locale

    return locale.setlocale(locale.LC_ALL)


def _set_locale(before: str) -> None:
    import locale

    locale.setlocale(locale.LC_ALL, before)


_PARTS = (
    _Part("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
    _Part("the working folder", os.getcwd, os.chdir),
    _Part("the umask", _umask, os.umask),
    _Part("signal handlers", _handlers, _set_handlers),
    _Part("the root logger", _root_logger, _set_root_logger),
    _Part("a filter for all warnings", _silencers, _set_silencers),
    _Part("the locale", _locale, _set_locale),
    _Part("the random state", random.getstate, random.setstate),
    _Part("the random state of numpy", _numpy_state, _set_numpy_state),
    _Part("the random state of torch", _torch_state, _set_torch_state),
    _Part("torch's default dtype", lambda: _torch().get_default_dtype(), lambda d: _torch().set_default_dtype(d)),
    _Part("torch's number of threads", lambda: _torch().get_num_threads(), lambda n: _torch().set_num_threads(n)),
    _Part("torch's grad mode", lambda: _torch().is_grad_enabled(), lambda on: _torch().set_grad_enabled(on)),
    _Part(
        "torch's deterministic mode",
        lambda: _torch().are_deterministic_algorithms_enabled(),
        lambda on: _torch().use_deterministic_algorithms(on),
    ),
    _Part("environment variables", _variables, None, _without_owned),
    _Part("sys.path", _path, None),
)

_UNTOUCHED = {"torch's grad mode": True, "torch's deterministic mode": False}
"""What holds where a part did not exist before, since the plugin's import has brought it in."""
