"""What a component has left in its process: in its classes and modules, in what all share, and of threads and files.

Each function gives texts by name, to be compared before and after. Only what can be told by its value is compared by
value; a model, a lock or a client is itself, whatever it holds.
"""

from __future__ import annotations

import asyncio
import decimal
import functools
import gc
import inspect
import io
import itertools
import locale
import logging
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import types
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

__all__ = [
    "SharedSettings",
    "changes",
    "changes_made_by",
    "child_processes",
    "component_state",
    "process_state",
    "unseeded_random_numbers",
    "variables_written",
    "what_runs",
]

_PathText = str | bytes | os.PathLike[str] | os.PathLike[bytes]
_DEPTH = 6
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_NOT_OF_PLUGINS = (*sys.stdlib_module_names, "nemo_rl_core", "attr", "attrs", "torch", "numpy", "transformers")


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What is not as it was, in words."""
    found = []
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name, "not there"), after.get(name, "not there")
        if was != now:
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(was, now, strict=False))
            start = max(0, sum(1 for _ in same) - 20)
            found.append(f"{name} was {_short(was, start)} and is {_short(now, start)}")
    return found


def _short(text: str, start: int) -> str:
    return ("..." if start else "") + text[start : start + 60]


# -- what belongs to the component ----------------------------------------------------------------------


def component_state(component: object) -> dict[str, str]:
    """Values of the classes of a component and of their modules, by name, and the defaults of their functions."""
    while isinstance(component, functools.partial):
        component = component.func
    found: dict[str, str] = {}
    seen: set[int] = set()
    for owner in component.__mro__ if isinstance(component, type) else (component,):
        if _is_of_a_plugin(getattr(owner, "__module__", None)):
            _describe_owner(owner, found, seen)
    return found


def _is_of_a_plugin(module: object) -> bool:
    return isinstance(module, str) and module.partition(".")[0] not in _NOT_OF_PLUGINS


def _describe_owner(owner: object, found: dict[str, str], seen: set[int]) -> None:
    """A class or function, and the names of its module."""
    if id(owner) in seen:
        return
    seen.add(id(owner))
    if isinstance(owner, type):
        for name, value in list(vars(owner).items()):
            if not (name.startswith("__") and name.endswith("__")):
                _describe(f"{owner.__qualname__}.{name}", value, found)
            function = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) or _bound(value) else None
            if isinstance(function, types.FunctionType):
                _describe_function(f"{owner.__qualname__}.{name}", function, found, seen)
    elif isinstance(owner, types.FunctionType):
        _describe_function(owner.__qualname__, owner, found, seen)


def _bound(value: object) -> bool:
    return isinstance(value, classmethod | staticmethod)


def _describe_function(name: str, function: types.FunctionType, found: dict[str, str], seen: set[int]) -> None:
    if function.__defaults__ or function.__kwdefaults__:
        found[f"a default argument of {name}"] = _text((function.__defaults__, function.__kwdefaults__))
    space = function.__globals__
    if id(space) not in seen and _is_of_a_plugin(space.get("__name__")):
        seen.add(id(space))
        _describe_module(str(space["__name__"]), space, found, seen)


def _describe_module(module: str, space: Mapping[str, Any], found: dict[str, str], seen: set[int]) -> None:
    for name, value in list(space.items()):
        if name.startswith("__") and name.endswith("__"):
            continue
        if getattr(value, "__module__", None) == module and isinstance(value, type | types.FunctionType):
            _describe_owner(value, found, seen)
        else:
            _describe(f"{module}.{name}", value, found)


def _describe(name: str, value: object, found: dict[str, str]) -> None:
    if not isinstance(value, types.ModuleType | types.FunctionType | classmethod | staticmethod | property | type):
        found[name] = _text(value)


def _text(value: object, depth: int = 0) -> str:
    """A value in words; what has no value of its own by its type and identity."""
    if isinstance(value, _PLAIN) or depth > _DEPTH:
        return repr(value) if isinstance(value, _PLAIN) else type(value).__name__
    inner = functools.partial(_text, depth=depth + 1)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{inner(k)}: {inner(v)}" for k, v in list(value.items())) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(inner, list(value)))) + "}"
    if isinstance(value, list | tuple | deque):
        return "[" + ", ".join(map(inner, list(value))) + "]"
    for kind, describe in _BY_TYPE:
        if isinstance(value, kind):
            return describe(value)
    cache_info = getattr(value, "cache_info", None)
    if cache_info is not None:
        return f"a cache of {cache_info().currsize}"
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict) and _is_of_a_plugin(type(value).__module__) and not callable(value):
        return f"{type(value).__name__}({inner(own)})"
    return f"{type(value).__name__} at {id(value):#x}"


_BY_TYPE: Sequence[tuple[Any, Callable[[Any], str]]] = (
    (random.Random, lambda value: f"random numbers at {hash(value.getstate()):x}"),
    (itertools.count, repr),
    (bytearray, repr),
)


# -- what all share --------------------------------------------------------------------------------------


def process_state() -> dict[str, str]:
    """What is one for the whole process, but for environment variables."""
    found = {name: str(read()) for name, read in _SHARED.items()}
    for signal_number in signal.valid_signals():
        found[f"the handler of signal {signal_number}"] = _text(signal.getsignal(signal_number))
    found |= _random_states()
    torch = sys.modules.get("torch")
    if torch is not None:
        found["the default dtype of torch"] = str(torch.get_default_dtype())
        found["whether torch records gradients"] = str(torch.is_grad_enabled())
        found["the number of threads of torch"] = str(torch.get_num_threads())
    return found


_SHARED: Mapping[str, Callable[[], Any]] = {
    "the working folder": os.getcwd,
    "sys.path": lambda: list(sys.path),
    "the recursion limit": sys.getrecursionlimit,
    "sys.stdout and sys.stderr": lambda: [id(sys.stdout), id(sys.stderr)],
    "sys.excepthook": lambda: id(sys.excepthook),
    "the root logger": lambda: [logging.root.level, logging.root.manager.disable, list(map(id, logging.root.handlers))],
    "the filters of warnings": lambda: list(warnings.filters),
    "the locale": lambda: locale.setlocale(locale.LC_ALL),
    "the precision of decimal numbers": lambda: decimal.getcontext().prec,
    "the default timeout of sockets": socket.getdefaulttimeout,
    "whether garbage is collected": gc.isenabled,
    "the policy of event loops": lambda: type(asyncio.get_event_loop_policy()).__qualname__,
    "the folder of temporary files": lambda: tempfile.tempdir,
}


@contextmanager
def variables_written() -> Iterator[list[str]]:
    """Names of the environment variables that are set or removed meanwhile, also to what they were."""
    found: list[str] = []
    kept = os.putenv, os.unsetenv

    def put(name: _PathText, value: _PathText) -> None:
        found.append(os.fsdecode(name))
        kept[0](name, value)

    def unset(name: _PathText) -> None:
        found.append(os.fsdecode(name))
        kept[1](name)

    os.putenv, os.unsetenv = put, unset
    try:
        yield found
    finally:
        os.putenv, os.unsetenv = kept


class SharedSettings:
    """Settings of the process as they are when it is made, to be set again."""

    def __init__(self) -> None:
        self._folder = os.getcwd()
        self._log_level, self._log_disabled = logging.root.level, logging.root.manager.disable
        self._recursion_limit, self._timeout = sys.getrecursionlimit(), socket.getdefaulttimeout()
        self._precision = decimal.getcontext().prec
        self._handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}

    def restore(self) -> None:
        """Set them again."""
        os.chdir(self._folder)
        logging.root.setLevel(self._log_level)
        logging.disable(self._log_disabled)
        sys.setrecursionlimit(self._recursion_limit)
        socket.setdefaulttimeout(self._timeout)
        decimal.getcontext().prec = self._precision
        for number, handler in self._handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextmanager
def unseeded_random_numbers() -> Iterator[None]:
    """Meanwhile the global random numbers have a state that no seed gives; then they have their own again."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    kept = random.getstate()
    random.seed()
    if numpy is not None:
        kept_of_numpy = numpy.random.get_state()
        numpy.random.seed(None)
    if torch is not None:
        kept_of_torch = torch.get_rng_state()
        torch.random.default_generator.seed()
    try:
        yield
    finally:
        random.setstate(kept)
        if numpy is not None:
            numpy.random.set_state(kept_of_numpy)
        if torch is not None:
            torch.set_rng_state(kept_of_torch)


def changes_made_by(call: Callable[[], object]) -> list[str]:
    """What a call changes for the whole process, and what it prints, in words; a first call may import."""
    settings = SharedSettings()
    try:
        call()
        settings.restore()
        printed = io.StringIO()
        with unseeded_random_numbers():
            before = process_state()
            with variables_written() as written, redirect_stdout(printed), redirect_stderr(printed):
                call()
            found = [f"the variable {name} was written" for name in dict.fromkeys(written)]
            found += changes(before, process_state())
    finally:
        settings.restore()
    return [*found, *([f"it printed {printed.getvalue()!r:.80}"] if printed.getvalue() else [])]


def _random_states() -> dict[str, str]:
    """States of the generators of random numbers that every caller without one of its own draws from."""
    found = {"the global state of `random`": f"{hash(random.getstate()):x}"}
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None:
        state = numpy.random.get_state()
        found["the global state of `numpy.random`"] = f"{hash((state[1].tobytes(), *state[2:])):x}"
    if torch is not None:
        found["the global state of `torch`'s random numbers"] = f"{hash(bytes(torch.get_rng_state().tolist())):x}"
    return found


# -- what runs or is open ----------------------------------------------------------------------------------


def what_runs() -> dict[Hashable, str]:
    """Threads, child processes and open files: what to call each, by what tells it from others."""
    found: dict[Hashable, str] = dict(_open_files())
    for kind in (_threads(), child_processes()):
        for identity, what in kind.items():
            found[identity] = what
    return found


def _threads() -> dict[int, str]:
    """Threads that run, by their identity: what to call each."""
    return {id(thread): f"the thread {thread.name!r}" for thread in threading.enumerate()}


def child_processes() -> dict[int, str]:
    """Processes that this one has started and that still run, by process id; none where the system does not tell."""
    return {pid: f"the process {pid} ({name})" for pid, name in _children()}


def _children() -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            head, _, tail = (folder / "stat").read_text().rpartition(")")
        except OSError:  # it has just ended
            continue
        state, parent = tail.split()[:2]
        if int(parent) == os.getpid() and state != "Z":
            yield int(folder.name), head.partition("(")[2]


def _open_files() -> dict[tuple[str, str], str]:
    """Open files, pipes and sockets, by number and target; none where the system does not tell."""
    found = {}
    for link in Path("/proc/self/fd").glob("*"):
        try:
            target = os.readlink(link)
        except OSError:  # of the listing itself
            continue
        found[link.name, target] = f"the open file {target}"
    return found
