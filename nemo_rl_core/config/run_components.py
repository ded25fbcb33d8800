"""Components of a run: found by name, created with their options, and remembered."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from nemo_rl_core.config.components import finished_options
from nemo_rl_core.registry import ComponentRef, PluginCall, Resolves, get_registry

if TYPE_CHECKING:
    from nemo_rl_core.protocols.reward import Reward
    from nemo_rl_core.schema import ComponentChoice

__all__ = ["RunComponents"]

T = TypeVar("T")


class RunComponents(Resolves):
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

    def _resolve(self, kind: str, choice: object, plugins: Mapping[str, str] | None) -> ComponentRef:
        return get_registry().resolve(kind, choice, plugins={**self.plugins, **(plugins or {})})

    def chosen(self, ref: ComponentRef) -> None:
        """Count a candidate as used, such as the one that the data is read with."""
        self.used.append(ref)

    def use(self, ref: ComponentRef[T]) -> T:
        """The component of a reference, counted as used."""
        self.used.append(ref)
        return ref.load()

    def make(self, ref: ComponentRef[type[T]], options: object) -> T:
        """The component called with its options (the default of its config class if there are none), if it takes any.

        Raises:
            InvalidConfig: The options do not fit.
        """
        return self._call(self.use(ref), options)

    def build(self, kind: str, choice: ComponentChoice, /) -> Any:
        """What a choice of the configuration names, made with its options; see `AlgorithmContext.resolve`."""
        return self.make(self.resolve(kind, choice.name), choice.options)

    def _call(self, component: Callable[..., T], options: object) -> T:
        ref = self.used[-1]
        with PluginCall(ref.kind, ref, "__init__", "made"):
            return component(finished_options(component, options)) if _takes_options(component) else component()

    def reward(self, choice: ComponentChoice) -> Reward:
        """A reward: a class is made with its options, a function has them as preset arguments."""
        ref = self.resolve("rewards", choice.name)
        component = ref.load()
        if isinstance(component, type):
            made: Reward = self.make(ref, choice.options)
            return made
        self.chosen(ref)
        found: Reward = partial(component, **choice.options) if choice.options else component
        return found


def _takes_options(component: Callable[..., object]) -> bool:
    """False for a class without options, which need not write a constructor."""
    try:
        inspect.signature(component).bind(None)
    except TypeError:
        return False
    except ValueError:  # written in C
        return True
    return True
