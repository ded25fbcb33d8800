"""Choice of the environment or reward that scores the responses of a run."""

from __future__ import annotations

from functools import partial

from nemo_rl_core.config.components import finished_options
from nemo_rl_core.config.run_components import RunComponents
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.rollouts.engine import EnvironmentFactory
from nemo_rl_core.rollouts.scoring.reward_env import reward_environment
from nemo_rl_core.schema import RunConfig
from nemo_rl_core.training.setup.parts import RunInputs

__all__ = ["make_environment"]


def make_environment(config: RunConfig, inputs: RunInputs, components: RunComponents) -> EnvironmentFactory:
    """Return what makes the environment of each episode: the environment's class, or a wrapped reward function."""
    given = [
        name
        for name, value in (
            ("reward_fn", inputs.reward),
            ("environment", inputs.environment),
            ("config.environment", config.environment.name),
            ("config.reward", config.reward.name),
        )
        if value is not None
    ]
    if not given:
        raise ConfigError(
            f"{config.algorithm} needs something that scores a response. Pass reward_fn=... to fit(), or set "
            "`reward: <name>` or `environment: <name>` in the configuration (nemo-rl plugins list --kind "
            "environments shows what is installed)."
        )
    if inputs.reward is not None:
        components.used.append(components.resolve("rewards", inputs.reward))
        return reward_environment(inputs.reward)
    if inputs.environment is not None:
        components.used.append(components.resolve("environments", inputs.environment))
        return _factory(inputs.environment, config.environment.options)
    if config.environment.name is not None:
        component = components.use(components.resolve("environments", config.environment.name))
        return _factory(component, finished_options(component, config.environment.options))
    return reward_environment(components.reward(config.reward))


def _factory(component: EnvironmentFactory | type, options: object) -> EnvironmentFactory:
    if not isinstance(component, type):
        return component
    return partial(component, finished_options(component, options))
