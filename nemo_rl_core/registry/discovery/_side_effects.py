"""What an import changes for all code of the process: noticed, named, and undone where that is safe."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

__all__ = ["SharedState", "SideEffect"]


class SideEffect(NamedTuple):
    """One thing that is no longer as it was."""

    text: str
    """Such as `the working folder is /tmp (it was /home/me)`."""
    undo: Callable[[], object] | None = None
    """Puts it back; None where others may rely on it by now."""


class _Value(NamedTuple):
    """One value that can be read and, where that is safe, set."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object] | None = None
    shown: bool = True
    """False for what says nothing to a reader, such as the state of a generator."""


class SharedState:
    """The state of the process at one moment."""

    def __init__(self) -> None:
        self._values = list(_values())
        self._before = {each.name: each.read() for each in self._values}
        self._environment = dict(os.environ)
        self._path = list(sys.path)
        self._signals = {number: signal.getsignal(number) for number in signal.valid_signals()}
        self._handlers = list(logging.root.handlers)
        self._filters = list(warnings.filters)
        self._threads = set(threading.enumerate())
        self._had_torch = "torch" in sys.modules

    def side_effects(self) -> list[SideEffect]:
        """What differs now."""
        found = [*self._of_values(), *self._of_signals(), *self._of_environment(), *self._of_lists()]
        threads = [t for t in threading.enumerate() if t not in self._threads and not t.daemon]
        found += [SideEffect(f"the thread {thread.name!r} was started") for thread in threads]
        if not self._had_torch and "torch" in sys.modules:
            found += _of_torch_defaults(sys.modules["torch"])
        return found

    def _of_values(self) -> Iterator[SideEffect]:
        for value in self._values:
            before = self._before[value.name]
            now = value.read()
            if _same(before, now):
                continue
            text = f"{value.name} is {now!r} (it was {before!r})" if value.shown else f"{value.name} was changed"
            write = value.write
            yield SideEffect(text, None if write is None else partial(write, before))

    def _of_signals(self) -> Iterator[SideEffect]:
        for number, before in self._signals.items():
            if signal.getsignal(number) is not before and signal.getsignal(number) != before:
                put_back = None if before is None else partial(signal.signal, number, before)
                yield SideEffect(f"{signal.Signals(number).name} has another handler", put_back)

    def _of_environment(self) -> Iterator[SideEffect]:
        """Variables that had a value are put back; new ones stay, as somebody may have read them by now.

        A new one that begins with the name of a module, such as RAY_CLIENT_MODE, is that library's own affair.
        """
        for name in os.environ.keys() - self._environment.keys():
            if not any(name.lower().startswith(module) for module in _top_modules()):
                yield SideEffect(f"the environment variable {name} is set to {os.environ[name]!r}")
        for name, before in self._environment.items():
            now = os.environ.get(name)
            if now != before:
                told = "is gone" if now is None else f"is {now!r}"
                put_back = partial(os.environ.__setitem__, name, before)
                yield SideEffect(f"the environment variable {name} {told} (it was {before!r})", put_back)

    def _of_lists(self) -> Iterator[SideEffect]:
        added = [entry for entry in sys.path if entry not in self._path]
        if [entry for entry in sys.path if entry in self._path] != self._path or not all(map(self._is_vendored, added)):
            yield SideEffect(f"sys.path was changed{f' (new: {added})' if added else ''}")
        added_handlers = [h for h in logging.root.handlers if h not in self._handlers]
        if logging.root.handlers != self._handlers:
            told = f" (new: {', '.join(type(h).__name__ for h in added_handlers)})" if added_handlers else ""
            yield SideEffect(f"the root logger has other handlers{told}", self._put_handlers_back)
        blanket = [f for f in warnings.filters if f not in self._filters and _is_blanket(f)]
        if blanket:
            yield SideEffect(f"warnings are filtered for everyone ({blanket[0][0]})", lambda: _remove_filters(blanket))

    def _is_vendored(self, entry: str) -> bool:
        """Whether a folder belongs to a library that brings others along."""
        return any(entry.startswith(os.path.join(known, "")) for known in self._path if known)

    def _put_handlers_back(self) -> None:
        logging.root.handlers[:] = self._handlers


def _top_modules() -> set[str]:
    return {name for name in sys.modules if "." not in name and len(name) > 2}


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    with suppress(Exception):  # arrays and tensors compare by element
        return bool(one == other)
    return (
        bool(all(_same(a, b) for a, b in zip(one, other, strict=True)))
        if isinstance(one, tuple)
        else _bytes(one) == _bytes(other)
    )


def _bytes(value: Any) -> bytes:
    array = value.numpy() if hasattr(value, "numpy") else value
    return bytes(array.tobytes()) if hasattr(array, "tobytes") else repr(value).encode()


def _is_blanket(entry: tuple[Any, ...]) -> bool:
    """A filter for every message of every module."""
    _, message, category, module, _ = entry
    return message is None and module is None and category in (Warning, UserWarning, DeprecationWarning, FutureWarning)


def _remove_filters(blanket: list[Any]) -> None:
    kept = [entry for entry in warnings.filters if entry not in blanket]
    warnings.filters[:] = kept  # type: ignore[index]
    with warnings.catch_warnings():  # has it read anew
        pass


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return ""


def _values() -> Iterator[_Value]:
    yield _Value("the working folder", _folder, os.chdir)
    yield _Value("the umask", _umask, os.umask)
    yield _Value("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit)
    yield _Value("the switch interval of threads", sys.getswitchinterval, sys.setswitchinterval)
    yield _Value("garbage collection", gc.isenabled, lambda on: gc.enable() if on else gc.disable())
    yield _Value("the level of the root logger", lambda: logging.root.level, logging.root.setLevel)
    yield _Value("logging.disable", lambda: logging.root.manager.disable, logging.disable)
    yield _Value("the state of `random`", random.getstate, random.setstate, shown=False)
    yield _Value("sys.stderr", lambda: sys.stderr, lambda file: setattr(sys, "stderr", file))
    yield from _of_loaded()


def _of_loaded() -> Iterator[_Value]:
    """Of libraries that are there already; nothing is imported for this."""
    modules = sys.modules
    if (locale := modules.get("locale")) is not None:
        yield _Value(
            "the locale", lambda: locale.setlocale(locale.LC_ALL), lambda v: locale.setlocale(locale.LC_ALL, v)
        )
    if (socket := modules.get("socket")) is not None:
        yield _Value("the default timeout of sockets", socket.getdefaulttimeout, socket.setdefaulttimeout)
    if (numpy := modules.get("numpy")) is not None and hasattr(numpy, "random"):
        legacy = numpy.random
        yield _Value("the state of `numpy.random`", legacy.get_state, legacy.set_state, shown=False)
    if (torch := modules.get("torch")) is not None and hasattr(torch, "get_default_dtype"):
        yield _Value("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype)
        yield _Value("torch's gradient mode", torch.is_grad_enabled, torch.set_grad_enabled)
        yield _Value("torch's number of threads", torch.get_num_threads, torch.set_num_threads)
        yield _Value(
            "torch's deterministic mode", torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
        )
        yield _Value("the state of torch's generator", torch.get_rng_state, torch.set_rng_state, shown=False)


def _of_torch_defaults(torch: Any) -> Iterator[SideEffect]:
    """Of a torch that came with the import itself: compared with how it starts."""
    if not hasattr(torch, "get_default_dtype"):
        return
    if torch.get_default_dtype() != torch.float32:
        text = f"torch's default dtype is {torch.get_default_dtype()} (it starts with torch.float32)"
        yield SideEffect(text, lambda: torch.set_default_dtype(torch.float32))
    if not torch.is_grad_enabled():
        yield SideEffect("torch's gradient mode is off", lambda: torch.set_grad_enabled(True))
    if torch.are_deterministic_algorithms_enabled():
        yield SideEffect("torch's deterministic mode is on", lambda: torch.use_deterministic_algorithms(False))
