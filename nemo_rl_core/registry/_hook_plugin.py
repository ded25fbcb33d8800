"""One listener of the hooks, and its failure."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from nemo_rl_core.registry._provider import Provider

if TYPE_CHECKING:
    from nemo_rl_core.registry.discovery._distributions import Distribution

__all__ = ["HookFailure", "HookPlugin"]


class HookPlugin(NamedTuple):
    """One listener: a module or object of an installed distribution, or a callback of a run."""

    label: str
    """How messages name it: `plugin x 1.2 (dist y)` or `callback module.Class`."""
    listener: object
    distribution: Distribution | None = None
    name: str = ""
    """Of the entry point, or under which the callback was asked for."""
    is_callback: bool = False
    """Given to this run, not listening to every run."""

    def __str__(self) -> str:
        return self.label

    @property
    def provider(self) -> Provider:
        """Who it is, for the trace."""
        cls = self.listener if isinstance(self.listener, ModuleType) else type(self.listener)
        value = f"{getattr(cls, '__module__', '')}:{getattr(cls, '__qualname__', '')}".strip(":") or cls.__name__
        dist = self.distribution
        name = self.name or value.rpartition(":")[2]
        return Provider("hook", name, dist.name if dist else None, dist.version if dist else None, value)

    @property
    def critical(self) -> bool:
        """Whether its exceptions stop the run."""
        return bool(getattr(self.listener, "critical", False))


class HookFailure(NamedTuple):
    """A listener that raised, and the run went on."""

    plugin: str
    hook: str
    error: Exception
