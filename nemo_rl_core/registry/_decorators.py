"""Decorators that register a component from user code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, overload

from nemo_rl_core.registry._registry import get_registry

__all__ = [
    "register_advantage",
    "register_algorithm",
    "register_callback",
    "register_command",
    "register_dataset",
    "register_environment",
    "register_exporter",
    "register_generation_backend",
    "register_launcher",
    "register_logger",
    "register_loss",
    "register_reward",
    "register_sandbox",
    "register_training_backend",
    "register_weight_sync",
]

T = TypeVar("T")


class Decorator(Protocol):
    """`@register_x("name")`, `@register_x("name", override=True)` or plain `@register_x`.

    Without a name the component's own (`__name__`) is taken. The component is returned as it was. It
    reaches every worker process, also from `__main__` and from a notebook.
    """

    @overload
    def __call__(self, name: str | None = None, /, *, override: bool = False) -> Callable[[T], T]: ...

    @overload
    def __call__(self, name: T, /) -> T: ...


def _decorator(kind: str) -> Decorator:
    def register(name: object = None, /, *, override: bool = False) -> object:
        if name is not None and not isinstance(name, str):
            get_registry().register(kind, getattr(name, "__name__", type(name).__name__), name, override=override)
            return name

        def decorate(component: T) -> T:
            own = getattr(component, "__name__", type(component).__name__)
            get_registry().register(kind, name or own, component, override=override)
            return component

        return decorate

    register.__doc__ = f"Register one of `{kind}`. {Decorator.__doc__}"
    return register  # type: ignore[return-value]


register_algorithm = _decorator("algorithms")
register_loss = _decorator("losses")
register_advantage = _decorator("advantages")
register_training_backend = _decorator("training_backends")
register_generation_backend = _decorator("generation_backends")
register_environment = _decorator("environments")
register_reward = _decorator("rewards")
register_dataset = _decorator("datasets")
register_launcher = _decorator("launchers")
register_weight_sync = _decorator("weight_syncs")
register_logger = _decorator("loggers")
register_callback = _decorator("callbacks")
register_sandbox = _decorator("sandboxes")
register_exporter = _decorator("exporters")
register_command = _decorator("commands")
