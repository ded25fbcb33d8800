"""Who ran, when, and who is to blame: the one thin layer between the core and what plugins provide.

The core calls a component inside `PluginCall`. An exception that leaves it is marked with who raised it
(`plugin boom 1.2 (dist acme), loss __call__`), and while a trace is written every call is one line of it.
One that would read as success or end somebody else's work (see `_escapes`) leaves it as a `PluginFailed`.
Without an exception or a trace the layer costs less than a microsecond a call.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import threading
import time
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from nemo_rl_core.errors import PluginError, PluginFailed, RunInterrupted
from nemo_rl_core.registry._current import current
from nemo_rl_core.registry._escapes import is_escape, text_of, what_escaped
from nemo_rl_core.registry._provider import Provider
from nemo_rl_core.registry.discovery._index import CORE, DENY_VARIABLE
from nemo_rl_core.registry.discovery._kinds import KINDS

if TYPE_CHECKING:
    from nemo_rl_core.registry._current import Lookup
    from nemo_rl_core.registry.discovery._index import Entry

__all__ = [
    "PluginCall",
    "Trace",
    "blame",
    "blamed",
    "contained",
    "failure_of",
    "mark",
    "origin_of",
    "provider_at_fault",
    "provider_of",
    "trace_event",
]

logger = logging.getLogger("nemo_rl_core.debug")

Event = Literal["import", "made", "call", "hook"]

_PER_ROLLOUT = ("environments", "rewards", "generate")
"""Calls that occur in every rollout; they are written to the file only, not to the log."""

_ORIGIN = "_nemo_rl_origin"
_DISTRIBUTION = "_nemo_rl_distribution"
_PASSED_ON = (PluginError, RunInterrupted, TimeoutError)
"""Exceptions that name who is meant by themselves, or that are no failure of the code they come through."""


# -- who provides an object ---------------------------------------------------------------------------------


def provider_of(kind: str, component: Any) -> Provider:
    """Who provides a component: of a reference, a class, a function, or an object made by them."""
    if hasattr(component, "qualified_name") and hasattr(component, "distribution"):  # a ComponentRef
        return Provider(kind, component.name, component.distribution, component.version, component.value)
    target = component.func if isinstance(component, functools.partial) else component
    if not isinstance(target, type) and not inspect.isroutine(target):
        target = type(target)
    registry, key = current(), (kind, target)
    found: Provider | None = registry.providers.get(key)
    if found is None:
        found = registry.providers[key] = _looked_up(registry, kind, target)
    return found


def _looked_up(registry: Lookup, kind: str, target: Any) -> Provider:
    module, qualname = str(target.__module__), str(getattr(target, "__qualname__", target.__name__))
    value = f"{module}:{qualname}"
    entry = next((e for e in registry.index.of(kind) if e.value == value), None)
    if entry is not None:
        return Provider(kind, entry.name, entry.distribution.name, entry.distribution.version, value)
    if module.partition(".")[0] == "nemo_rl_core":
        return Provider(kind, qualname, CORE, None, value)
    name = next((r.name for r in registry.entries(kind) if r.origin == "decorator" and r.value == value), qualname)
    owner = _owner(module)
    if owner is None:
        return Provider(kind, name, None, None, value)
    return Provider(kind, name, owner.distribution.name, owner.distribution.version, value)


def _owner(module: str) -> Entry | None:
    """An entry point of the distribution that a module seems to belong to."""
    parts = module.split(".")
    if parts[0] in ("nemo_rl_core", "__main__", "__mp_main__"):  # the core's own helpers are nobody's plugin
        return None
    best, longest = None, 0
    for entries in current().index.entries.values():
        for entry in entries:
            own = entry.value.partition(":")[0].split(".")
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(own, parts, strict=False)))
            if shared > longest:
                best, longest = entry, shared
    return best


def provider_at_fault(error: BaseException) -> tuple[Provider, str] | None:
    """The plugin whose code is innermost in a traceback, and the function; None if there is none."""
    found: tuple[Provider, str] | None = None
    frames: TracebackType | None = error.__traceback__
    while frames is not None:
        code, module = frames.tb_frame.f_code, str(frames.tb_frame.f_globals.get("__name__"))
        owner = _owner(module)
        if owner is not None and owner.distribution.name != CORE:
            inner = _within(owner, module, code.co_qualname)
            # The component that was called says more than a helper of the same distribution.
            if found is None or inner[0].kind in KINDS or inner[0].distribution != found[0].distribution:
                found = inner
        frames = frames.tb_next
    return found


def _within(owner: Entry, module: str, qualname: str) -> tuple[Provider, str]:
    """The component that a function belongs to, or some component of its distribution."""
    dist = owner.distribution
    for entries in current().index.entries.values():
        for entry in entries:
            own_module, _, own_name = entry.value.partition(":")
            if entry.distribution is dist and own_module == module and _starts(qualname, own_name):
                kind = entry.group.rpartition(".")[2]
                call = qualname.removeprefix(own_name).replace("<locals>.", "").lstrip(".") or "call"
                return Provider(kind, entry.name, dist.name, dist.version, entry.value), call
    name = owner.name if owner.value.partition(":")[0] == module else dist.name
    return Provider("function", name, dist.name, dist.version, f"{module}:{qualname}"), qualname


def _starts(qualname: str, name: str) -> bool:
    return bool(name) and (qualname == name or qualname.startswith(f"{name}."))


# -- who raised ---------------------------------------------------------------------------------------------


def origin_of(error: BaseException) -> str | None:
    """Who raised an exception, as `blame` marked it: `plugin boom 1.2 (dist acme), loss __call__`."""
    found: str | None = getattr(error, _ORIGIN, None)
    return found


def blamed(error: BaseException) -> tuple[str, str | None] | None:
    """Who raised an exception, and that plugin's distribution; None if it was not marked."""
    origin = origin_of(error)
    return None if origin is None else (origin, getattr(error, _DISTRIBUTION, None))


def blame(error: BaseException, provider: Provider, call: str) -> None:
    """Mark an exception with who raised it, once: the innermost plugin of its traceback, else `provider`.

    The message begins with it where an exception's message can be changed; others get it as a note.
    """
    if not _can_be_marked(error):
        return
    inner = provider_at_fault(error)
    if inner is not None and inner[0].distribution != provider.distribution:
        provider, call = inner
    if provider.distribution != CORE:
        mark(error, provider.at(call), provider.distribution)


def _can_be_marked(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, _PASSED_ON) and origin_of(error) is None


def mark(error: BaseException, origin: str, distribution: str | None = None) -> None:
    """As `blame`, with who raised it as text."""
    if not _can_be_marked(error):
        return
    with suppress(AttributeError, TypeError):  # a class with slots takes no mark
        setattr(error, _ORIGIN, origin)
        setattr(error, _DISTRIBUTION, distribution)
    text = text_of(error)
    before = error.args
    if not before or text == before[0]:
        error.args = (f"{origin}: {text or type(error).__name__}", *before[1:])
    if not str(error).startswith(origin):  # it makes its text in another way
        error.args = before
        error.add_note(f"Raised by {origin}.")


def failure_of(error: BaseException, provider: Provider, call: str) -> PluginFailed:
    """What stands for an exception that may not leave a plugin as it is.

    Args:
        error: One for which `is_escape` holds.
        provider: Who was called, unless the traceback shows somebody else.
        call: What was called.
    """
    inner = provider_at_fault(error)
    if inner is not None and inner[0].distribution != provider.distribution:
        provider, call = inner
    origin, distribution = provider.at(call), provider.distribution
    fix = f" Upgrade it (pip install -U {distribution}), choose another, or disable it: {DENY_VARIABLE}={distribution}"
    found = PluginFailed(f"{origin}: {what_escaped(error)}.{fix if distribution not in (None, CORE) else ''}")
    setattr(found, _ORIGIN, origin)
    setattr(found, _DISTRIBUTION, distribution)
    return found


class contained:
    """`with contained("algorithms", algorithm, "fill_batch"):` around a call that goes back into the core.

    Ordinary exceptions pass unmarked, for they may be the core's own, and nothing is traced. (A class, for the
    generators of `contextlib` have their own way with StopIteration.)
    """

    __slots__ = ("call", "component", "kind")

    def __init__(self, kind: str, component: object, call: str) -> None:
        self.kind = kind
        self.component = component
        self.call = call

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None and is_escape(error):
            raise failure_of(error, provider_of(self.kind, self.component), self.call) from error


# -- the trace ----------------------------------------------------------------------------------------------


class Trace:
    """A file with one line of JSON for each time the core ran a plugin's code, and the same in the log.

    Several processes may write one file: each line is one write at the end of the file.

    Args:
        path: The file; its folder is made. It is added to.
        process: What this process is called in it, such as `driver` or `policy rank 0`.
    """

    def __init__(self, path: Path, process: str = "driver") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.process = process
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._lock = threading.Lock()
        self._number = 0
        self._outer: Trace | None = None

    def __enter__(self) -> Trace:
        """Make it the trace of this process."""
        global _trace
        self._outer, _trace = _trace, self
        for provider, seconds, started in _imports:
            self.write("import", provider, "import", seconds, None, started=started)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop writing."""
        global _trace
        _trace = self._outer
        os.close(self._file)
        self._file = -1

    def write(
        self,
        event: Event,
        provider: Provider,
        call: str,
        seconds: float,
        error: BaseException | None,
        *,
        started: float | None = None,
    ) -> None:
        """Add one line; the core's own helpers (no entry point leads to them) are passed over."""
        if provider.distribution == CORE and provider.version is None:
            return
        with self._lock:
            self._number += 1
            row = {
                "number": self._number,
                "time": round(time.time() - seconds if started is None else started, 6),
                "seconds": round(seconds, 6),
                "process": self.process,
                "event": event,
                "kind": provider.kind,
                "name": provider.name,
                "call": call,
                "distribution": provider.distribution,
                "version": provider.version,
                "value": provider.value,
                "error": None if error is None else f"{type(error).__name__}: {text_of(error)}",
            }
            if self._file >= 0:
                os.write(self._file, (json.dumps(row) + "\n").encode())
        if provider.kind in _PER_ROLLOUT or call in _PER_ROLLOUT:
            return
        failed = "" if error is None else f" raised {row['error']}"
        logger.debug("%s: %s %.1f ms%s", event, provider.at(call), seconds * 1e3, failed)


_trace: Trace | None = None
_imports: list[tuple[Provider, float, float]] = []
"""Components imported so far, with seconds taken and the time: most are before a run begins its trace."""


def trace_event(
    event: Event, provider: Provider, call: str, seconds: float, error: BaseException | None = None
) -> None:
    """Write one event, if a trace is written."""
    if _trace is not None:
        _trace.write(event, provider, call, seconds, error)


class PluginCall:
    """`with PluginCall("losses", loss, "__call__"):` around each place where the core runs a plugin's code.

    Args:
        kind: Kind of the component.
        component: A reference, the class or function, or the object made by it.
        call: The method that is called; "made" when the component is constructed.
        event: What the trace calls it.
    """

    __slots__ = ("call", "component", "event", "kind", "started")

    def __init__(self, kind: str, component: object, call: str, event: Event = "call") -> None:
        self.kind = kind
        self.component = component
        self.call = call
        self.event: Event = event

    def __enter__(self) -> None:
        self.started = time.perf_counter() if _trace is not None or self.event == "import" else 0.0

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        failure: PluginFailed | None = None
        if error is not None and self.event != "import":  # that is told by `ComponentRef.load`
            provider = provider_of(self.kind, self.component)
            if is_escape(error):
                failure = failure_of(error, provider, self.call)
            else:
                blame(error, provider, self.call)
        if _trace is not None or self.event == "import":
            self._write(error)
        if failure is not None:
            raise failure from error

    def _write(self, error: BaseException | None) -> None:
        seconds = time.perf_counter() - self.started if self.started else 0.0
        provider = provider_of(self.kind, self.component)
        if self.event == "import":
            _imports.append((provider, seconds, time.time() - seconds))
        if _trace is not None:
            _trace.write(self.event, provider, self.call, seconds, error)
