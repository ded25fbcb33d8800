"""A tiny registry with one component of each kind that a configuration chooses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
from attrs import field, frozen
from attrs.validators import gt  # attrs' own: plugin authors use them too

from nemo_rl_core.errors import PluginBroken, PluginConflict, PluginNotFound
from nemo_rl_core.schema import ComponentChoice, Mistake, RunConfig, component, mistake
from nemo_rl_core.schema.validators import ge


@frozen(kw_only=True)
class BackendOptions:
    depth: int = field(default=2, validator=ge(1))
    """Levels of the backend."""
    mode: Literal["eager", "graph"] = "eager"
    """How it runs."""

    def check(self) -> Iterator[Mistake]:
        if self.mode == "graph" and self.depth > 8:
            yield mistake("depth", f"graph mode reaches 8 levels, found {self.depth}", "Lower it.", related=["mode"])


class Backend:
    config_class = BackendOptions


class Engine:
    """No options: declares no class."""


class Launcher:
    config_class = dict


@frozen(kw_only=True)
class LossOptions:
    clip: float = field(default=0.2, validator=gt(0))
    """Clip of the ratio."""


class Loss:
    config_class = LossOptions


@frozen(kw_only=True)
class ToyConfig(RunConfig):
    """Root class of the algorithm `toy`."""

    algorithm: Any = "toy"
    num_prompts_per_step: int = field(default=8, validator=ge(1))
    """Prompts of one step."""
    num_generations_per_prompt: int = field(default=4, validator=ge(1))
    """Rollouts of one prompt."""
    updates_per_step: int = field(default=1, validator=ge(1))
    """Optimizer steps of one step."""
    loss: ComponentChoice = component("losses", "clip")
    """The objective."""

    @property
    def num_items_per_step(self) -> int:
        return self.num_prompts_per_step

    @property
    def group_size(self) -> int:
        return self.num_generations_per_prompt

    @property
    def num_updates_per_step(self) -> int:
        return self.updates_per_step

    def check(self) -> Iterator[Mistake]:
        rollouts = self.num_prompts_per_step * self.num_generations_per_prompt
        if rollouts % self.updates_per_step:
            problem = f"{rollouts} rollouts cannot be divided into {self.updates_per_step} minibatches"
            yield mistake("updates_per_step", problem, "Use a divisor.", related=["num_prompts_per_step"])


class Toy:
    config_class = ToyConfig


class Reference:
    def __init__(self, value: Any) -> None:
        self.value = value

    def load(self) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value

    def config_class(self) -> type | None:
        return getattr(self.load(), "config_class", None)


class Registry:
    """What configuration asks of the real one; `conflict:` and `broken` behave like such plugins."""

    components: ClassVar[dict[str, dict[str, Any]]] = {
        "algorithms": {"toy": Toy, "toy2": Toy},
        "training_backends": {"plain": Backend},
        "generation_backends": {"sampler": Engine, "broken": PluginBroken("broken 1.0 fails to import: no libfoo")},
        "launchers": {"local": Launcher},
        "weight_syncs": {"in_process": Engine},
        "losses": {"clip": Loss, "other": Engine},
        "loggers": {"lines": Backend},
        "environments": {"maze": Backend, "shop": Engine},
        "datasets": {"jsonl": Backend},
    }

    def resolve(self, kind: str, choice: Any, *, plugins: Mapping[str, str] | None = None) -> Reference:
        if not isinstance(choice, str):
            return Reference(choice)
        name = (plugins or {}).get(choice, choice).rpartition(":")[2]
        if name not in self.components.get(kind, {}):
            raise PluginNotFound(f"No {kind} named {choice!r}.")
        return Reference(self.components[kind][name])

    def default(self, kind: str) -> str | None:
        names = self.names(kind)
        if len(names) > 1 and kind == "environments":
            raise PluginConflict("Two environments are installed.")
        return names[0] if names else None

    def names(self, kind: str) -> list[str]:
        return list(self.components.get(kind, {}))


@pytest.fixture(scope="session")
def registry() -> Registry:
    return Registry()


@pytest.fixture(scope="session")
def toy() -> SimpleNamespace:
    """The classes above, for tests that build configurations in Python."""
    return SimpleNamespace(
        Backend=Backend, BackendOptions=BackendOptions, Config=ToyConfig, Loss=Loss, LossOptions=LossOptions
    )
