"""The registry of this process, for those below it: a slot, and what they need of what lies in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from nemo_rl_core.registry._hook_plugin import HookPlugin
    from nemo_rl_core.registry.discovery._distributions import Distribution
    from nemo_rl_core.registry.discovery._index import Index

__all__ = ["Lookup", "current", "make_with"]


class Known(Protocol):
    """What is known of a component without importing it."""

    @property
    def distribution(self) -> str | None:
        """Who provides it; None is user code."""
        ...

    def load(self) -> Any:
        """Import it. Raises `PluginBroken` if that fails."""
        ...

    @property
    def name(self) -> str:
        """Under which it is asked for."""
        ...

    @property
    def value(self) -> str | None:
        """`module:attr`."""
        ...

    @property
    def origin(self) -> str:
        """How the registry came to know it."""
        ...


class Listening(Protocol):
    """The installed hook plugins."""

    plugins: tuple[HookPlugin, ...]


class Lookup(Protocol):
    """A registry, as those ask it whom it is made of."""

    providers: dict[Any, Any]
    """Who provides which class or function, as far as it was asked."""
    strict: bool
    """Any broken plugin is an error."""

    @property
    def index(self) -> Index:
        """The entry points of what is installed."""
        ...

    def distribution(self, name: str) -> Distribution | None:
        """An installed distribution that provides anything, by its name."""
        ...

    def entries(self, kind: str | None = None) -> Sequence[Known]:
        """All components of a kind."""
        ...

    @property
    def hooks(self) -> Listening:
        """The installed hook plugins, imported at the first use."""
        ...

    def resolve(self, kind: str, choice: object) -> Known:
        """The component of that name or object. Raises a `PluginError`."""
        ...

    def check_manifest(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Compare rows of a manifest with what is installed here. Raises `PluginIncompatible`."""
        ...


_make: Callable[[], Lookup] | None = None


def make_with(make: Callable[[], Lookup]) -> None:
    """Say what gives the registry of this process; the package does so when it is imported."""
    global _make
    _make = make


def current() -> Lookup:
    """The registry of this process."""
    assert _make is not None, "nemo_rl_core.registry says how the registry is made when it is imported"
    return _make()
