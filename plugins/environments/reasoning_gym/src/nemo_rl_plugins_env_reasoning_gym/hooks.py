"""Provision hooks: every generator as `reasoning_gym/<task>`, by lazy reference."""

from __future__ import annotations

from collections.abc import Mapping

from nemo_rl_core.hookspecs import hookimpl
from nemo_rl_plugins_env_reasoning_gym.tasks import known_tasks

__all__ = ["nemo_rl_datasets", "nemo_rl_environments"]

_PACKAGE = "nemo_rl_plugins_env_reasoning_gym"


@hookimpl
def nemo_rl_datasets() -> Mapping[str, str]:
    """`reasoning_gym/<task>`: the rows of one generator."""
    return {f"reasoning_gym/{task}": f"{_PACKAGE}.named:{task}" for task in known_tasks()}


@hookimpl
def nemo_rl_environments() -> Mapping[str, str]:
    """`reasoning_gym/<task>`: one environment scores every generator, by the row's `metadata.source_dataset`."""
    return {f"reasoning_gym/{task}": f"{_PACKAGE}.environment:ReasoningGymEnvironment" for task in known_tasks()}
