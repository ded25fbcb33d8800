"""Reference to a component: known by name at once, imported on demand, sent to workers."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal

import attrs
from attrs import define, field, frozen
from typing_extensions import TypeVar

from nemo_rl_core.errors import NemoRLError, PluginBroken, PluginError, PluginIncompatible
from nemo_rl_core.registry._current import current
from nemo_rl_core.registry._escapes import comes_from_outside, text_of
from nemo_rl_core.registry._trace import PluginCall
from nemo_rl_core.registry._verify import shortcoming
from nemo_rl_core.registry.discovery._declared import declared_config_class
from nemo_rl_core.registry.discovery._importing import importing
from nemo_rl_core.registry.discovery._index import CORE, DENY_VARIABLE
from nemo_rl_core.registry.discovery._kinds import KINDS
from nemo_rl_core.registry.discovery._source import source_file, source_hash

__all__ = ["ComponentRef", "LoadStatus", "Origin", "State", "import_path", "is_importable"]

T_co = TypeVar("T_co", default=Any, covariant=True)
"""What loading gives, such as `type[Loss]`."""

_MAIN = ("__main__", "__mp_main__")

Origin = Literal["entry point", "decorator", "hook", "import path", "object"]
"""How the registry came to know a component."""

State = Literal["found", "compatible", "loaded", "broken"]
"""found: known by name; compatible: its metadata fits this core; loaded: imported and verified;
broken: one of these failed, see `ComponentRef.error`."""


@define
class LoadStatus:
    """What is known of one component in this process; shared by all references to it."""

    state: State = "found"
    error: PluginError | None = None
    traceback: str | None = None
    component: Any = None

    def fail(self, error: PluginError) -> PluginError:
        """Keep the error and its traceback, and return it to be raised."""
        self.state, self.error = "broken", error
        cause = error.__cause__ or error
        self.traceback = "".join(traceback.format_exception(cause))
        return error


@frozen(kw_only=True)
class ComponentRef(Generic[T_co]):
    """One component of one kind.

    A reference pickles small: by import path where the component has an importable home, else (objects of
    `__main__`, of a notebook or of a function) by value. `load` in another process imports it there and
    raises `PluginIncompatible` if that process has another version or source than the one it came from.

    Two references are equal when they name the same component.
    """

    kind: str
    name: str
    value: str | None = None
    """`module:attr`, or None for an object without an importable home."""
    distribution: str | None = None
    """Canonical name of the distribution that provides it; None for user code."""
    version: str | None = None
    api_version: int = 1
    """Version of the kind's contract."""
    origin: Origin = "entry point"
    editable: bool = False
    """The distribution is run from a working tree."""
    _check: Callable[[], str | None] | None = field(default=None, eq=False, repr=False)
    _payload: bytes | None = field(default=None, eq=False, repr=False)
    _expected_hash: str | None = field(default=None, eq=False, repr=False)
    _received: bool = field(default=False, eq=False, repr=False)
    _status: LoadStatus = field(factory=LoadStatus, eq=False, repr=False)

    @property
    def qualified_name(self) -> str:
        """`dist:name`, or for user code `module:name` or the import path."""
        if self.distribution:
            return f"{self.distribution}:{self.name}"
        if self.origin == "decorator" and self.value:
            return f"{self.value.partition(':')[0]}:{self.name}"
        return self.value or self.name

    @property
    def description(self) -> str:
        """Kind, name and provider, as messages call it."""
        by = f" of {self.distribution} {self.version}" if self.distribution else ""
        where = f" ({self.value})" if self.value and self.value != self.name else ""
        return f"{KINDS[self.kind].label} {self.name!r}{by}{where}"

    @property
    def state(self) -> State:
        """See `State`."""
        return self._status.state

    @property
    def error(self) -> PluginError | None:
        """Why it is broken, or None."""
        return self._status.error

    @property
    def traceback(self) -> str | None:
        """The traceback of what made it broken, as text."""
        return self._status.traceback

    @property
    def source_hash(self) -> str | None:
        """Digest of its source where a version does not identify it: working trees and user code."""
        if self.distribution and not self.editable:
            return None
        return source_hash(self.value, whole_package=self.distribution is not None, component=self._status.component)

    @property
    def manifest_row(self) -> dict[str, Any]:
        """Its row of a manifest: plain strings and numbers, fit for JSON."""
        return {
            "kind": self.kind,
            "name": self.name,
            "distribution": self.distribution,
            "version": self.version,
            "value": self.value,
            "api_version": self.api_version,
            "source_hash": self.source_hash,
            "origin": self.origin,
            "defined_in": None if self.distribution else source_file(self._status.component),
        }

    def check(self) -> None:
        """Compare the metadata with this core, without importing anything.

        Raises:
            PluginIncompatible: Written for another core or contract.
            PluginBroken: Its entry point cannot be read.
        """
        if self._status.error is not None:
            raise self._status.error
        if self._status.state != "found":
            return
        try:
            problem = self._check() if self._check is not None else None
        except PluginError as error:
            raise self._status.fail(error) from error.__cause__
        if problem is not None:
            raise self._status.fail(PluginIncompatible(f"The {self.description} does not fit: {problem}"))
        self._status.state = "compatible"

    def load(self) -> T_co:
        """The component itself: a class or a function. Imported and verified once per process.

        Raises:
            PluginBroken: It cannot be imported, or is not what its kind requires.
            PluginIncompatible: Written for another core, or this process has another version of it.
        """
        if self._status.state == "loaded":
            loaded: T_co = self._status.component
            return loaded
        self.check()
        try:
            component = self._obtain()
            problem = self._shortcoming(component)
            if problem is not None:
                raise PluginBroken(f"The {self.description} is broken: {problem}. {self._remedy()}")
        except PluginError as error:
            self._status.fail(error)
            raise
        self._status.component, self._status.state = component, "loaded"
        return self.load()

    def config_class(self) -> type | None:
        """The class of its options, its attribute `config_class`; None if it has none.

        Where the source tells which class that is, only the module of that class is imported, not the component with
        all that it needs.

        Raises:
            PluginError: See `load`.
        """
        if self._status.component is None and self._payload is None and self.value is not None:
            self.check()
            path = declared_config_class(self.value)
            if path is not None:
                with contextlib.suppress(Exception), importing(self.description):
                    found = import_path(path)
                    if isinstance(found, type) and attrs.has(found):
                        return found
        found = getattr(self.load(), "config_class", None)
        return found if isinstance(found, type) else None

    def _shortcoming(self, component: object) -> str | None:
        try:
            return shortcoming(self.kind, component)
        except BaseException as error:  # such as a metaclass that raises
            if comes_from_outside(error):
                raise
            return f"looking at it raised {type(error).__name__}: {text_of(error)}"

    def _obtain(self) -> object:
        if self._status.component is not None:
            return self._status.component
        self._compare_with_sender()
        try:
            if self._payload is not None:
                import cloudpickle  # type: ignore[import-untyped,unused-ignore]

                with importing(self.description):
                    return cloudpickle.loads(self._payload)
            if self.value is None:
                raise PluginBroken(f"The {self.description} has neither an import path nor an object.")
            with PluginCall(self.kind, self, "import", "import"), importing(self.description):
                return import_path(self.value)
        except PluginError:
            raise
        except BaseException as error:
            if comes_from_outside(error):
                raise
            raise self._broken(error) from error

    def _broken(self, error: BaseException) -> PluginBroken:
        found = str(error) if isinstance(error, NemoRLError) else f"{type(error).__name__}: {text_of(error)}"
        return PluginBroken(f"The {self.description} is broken: importing it raised {found}. {self._remedy()}")

    def _remedy(self) -> str:
        if self.distribution is None:
            return "Correct that code."
        if self.distribution == CORE:
            return "Reinstall nemo-rl-core."
        return (
            f"Repair it (pip install -U {self.distribution}), choose another {KINDS[self.kind].label}, "
            f"or disable the plugin: {DENY_VARIABLE}={self.distribution}"
        )

    def _compare_with_sender(self) -> None:
        """In a process that got this reference by pickle: is the code the same as where it came from?"""
        if self._received and self._payload is None:
            current().check_manifest([{**self.manifest_row, "source_hash": self._expected_hash}])

    def __reduce__(self) -> tuple[Any, ...]:
        """By import path where that leads to the same object, else by value."""
        fields = {
            "kind": self.kind,
            "name": self.name,
            "value": self.value,
            "distribution": self.distribution,
            "version": self.version,
            "api_version": self.api_version,
            "origin": self.origin,
            "editable": self.editable,
            "payload": self._payload,
            "expected_hash": None,
        }
        if self._payload is None and not self._has_home():
            fields["payload"] = self._by_value()
        elif self._payload is None:
            fields["expected_hash"] = self._expected_hash or self.source_hash
        return _rebuild, (fields,)

    def _has_home(self) -> bool:
        if self.value is None or self.value.partition(":")[0] in _MAIN:
            return False
        if self.origin in ("entry point", "import path") or self._status.component is None:
            return True
        return is_importable(self.value, self._status.component)

    def _by_value(self) -> bytes:
        import cloudpickle  # type: ignore[import-untyped,unused-ignore]

        component = self.load()
        module = sys.modules.get((self.value or "").partition(":")[0])
        made_here = module is not None and module.__name__ not in _MAIN and getattr(module, "__spec__", None) is None
        try:
            if made_here:  # no file that another process could import
                cloudpickle.register_pickle_by_value(module)
            payload: bytes = cloudpickle.dumps(component)
        except Exception as error:
            raise PluginError(
                f"The {self.description} cannot be sent to worker processes: it has no importable home and "
                f"pickling it raised {type(error).__name__}: {error}. Move it into a module of its own."
            ) from error
        finally:
            if made_here:
                cloudpickle.unregister_pickle_by_value(module)
        return payload


def _rebuild(fields: Mapping[str, Any]) -> ComponentRef:
    return ComponentRef(**fields, received=True)


def import_path(value: str) -> Any:
    """The object at `module:attr`.

    Raises:
        ImportError: The module has no such attribute (with its public names), or what importing it raised.
    """
    module_name, _, attributes = value.partition(":")
    found: Any = importlib.import_module(module_name)
    for attribute in attributes.split(".") if attributes else ():
        try:
            found = getattr(found, attribute)
        except AttributeError:
            names = ", ".join(name for name in sorted(vars(found)) if not name.startswith("_")) or "nothing public"
            raise ImportError(f"{module_name} has no attribute {attributes!r}; it has {names}") from None
    return found


def is_importable(value: str, component: object) -> bool:
    """Whether importing `value` in another process gives `component`."""
    module_name, _, attributes = value.partition(":")
    if module_name in _MAIN or "<" in value or module_name not in sys.modules:
        return False
    module = sys.modules[module_name]
    found: Any = module
    for attribute in attributes.split("."):
        found = inspect.getattr_static(found, attribute, None)
    spec = getattr(module, "__spec__", None)
    return found is component and spec is not None and spec.origin is not None
