"""Check that the models of a run fit their training backends, before any worker starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import evolve

from nemo_rl_core.config.layouts import training_backend
from nemo_rl_core.schema import PolicyConfig
from nemo_rl_core.schema.fields import fields_of
from nemo_rl_core.schema.mistakes import InvalidConfig, locate

if TYPE_CHECKING:
    from nemo_rl_core.schema import RunConfig
    from nemo_rl_core.schema.mistakes import Mistake

__all__ = ["check_models", "configured_models"]


def configured_models(config: RunConfig) -> dict[str, tuple[Any, PolicyConfig]]:
    """Backend and configuration of the policy, and of each model that the configuration has beside it."""
    found = {f.name: getattr(config, f.name) for f in fields_of(type(config))}
    models = {name: model for name, model in found.items() if isinstance(model, PolicyConfig)}
    return {name: (training_backend(model, config.plugins), _named(model, config)) for name, model in models.items()}


def _named(model: PolicyConfig, config: RunConfig) -> PolicyConfig:
    """A model beside the policy is the policy's unless it says otherwise."""
    return evolve(model, model_name=model.model_name or config.policy.model_name)


def check_models(models: Mapping[str, tuple[Any, PolicyConfig]]) -> None:
    """Ask each model's backend what does not fit.

    Args:
        models: Backend (or None) and configuration with structured options, by role.

    Raises:
        InvalidConfig: All that does not fit.
        ConfigError: A model's configuration cannot be read.
    """
    mistakes: list[Mistake] = []
    asked: list[Any] = []
    for role, (backend, model) in models.items():
        plain = evolve(model, trained=True)
        if not hasattr(backend, "check") or (backend, plain) in asked:
            continue  # such as a reference model that is the policy at its start
        asked.append((backend, plain))
        mistakes += [found.under(role) for found in backend.check(model)]
    if mistakes:
        raise InvalidConfig(locate(mistakes, {}))
