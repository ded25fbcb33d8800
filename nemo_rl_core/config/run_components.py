"""Components of a run: found by name, created with their options, and remembered."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from nemo_rl_core.config.components import finished_options
from nemo_rl_core.registry import ComponentRef, PluginCall, get_registry

if TYPE_CHECKING:
    from nemo_rl_core.protocols.reward import Reward
    from nemo_rl_core.schema import ComponentChoice

__all__ = ["RunComponents"]


class RunComponents:
    """Looks names up, remembering every component that the run uses (for the manifest).

    Args:
        plugins: As in the configuration: the distribution that a name is taken from where several have it.
    """

    def __init__(self, plugins: Mapping[str, str] | None = None) -> None:
        self.plugins: Mapping[str, str] = plugins or {}
        self.used: list[ComponentRef] = []

    def names(self, kind: str) -> Sequence[str]:
        """Names of a kind; with `resolve` and `chosen`, what the data module asks of a registry."""
        return get_registry().names(kind)

    def resolve(self, kind: str, name: Any) -> ComponentRef:
        """A candidate, not yet counted as used."""
        return get_registry().resolve(kind, name, plugins=self.plugins)

    def chosen(self, ref: ComponentRef) -> None:
        """The candidate that the data is read with."""
        self.used.append(ref)

    def load(self, kind: str, name: Any) -> Any:
        """The component itself; None takes the default of its kind."""
        ref = self.resolve(kind, name)
        self.used.append(ref)
        return ref.load()

    def build(self, kind: str, choice: ComponentChoice) -> Any:
        """The component called with its options (the default of its config class if there are none)."""
        return self.make(kind, self.load(kind, choice.name), choice.options)

    def make(self, kind: str, component: Any, options: Any) -> Any:
        """The component that was loaded last, called with its options if it takes any."""
        with PluginCall(kind, self.used[-1], "__init__", "made"):
            return component(finished_options(component, options)) if _takes_options(component) else component()

    def reward(self, choice: ComponentChoice) -> Reward:
        """A reward: a class is made with its options, a function has them as preset arguments."""
        component: Any = self.load("rewards", choice.name)
        if isinstance(component, type):
            made: Reward = self.make("rewards", component, choice.options)
            return made
        found: Reward = partial(component, **choice.options) if choice.options else component
        return found


def _takes_options(component: Any) -> bool:
    """False for a class without options, which need not write a constructor."""
    try:
        inspect.signature(component).bind(None)
    except TypeError:
        return False
    except ValueError:  # written in C
        return True
    return True
