"""Mistakes between the fields of a `PPOConfig`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_rl_plugins_ppo.config import ClippedSurrogateConfig, PPOConfig

__all__ = ["find_mistakes"]


def find_mistakes(config: PPOConfig) -> Iterator[Any]:
    """Yield a `Mistake` of the core for each combination of fields that cannot be meant.

    Options of another loss than ours are not judged here.
    """
    yield from _steps(config)
    yield from _critic(config)
    if isinstance(config.loss.options, ClippedSurrogateConfig):
        yield from _loss(config, config.loss.options)


def _steps(config: PPOConfig) -> Iterator[Any]:
    from nemo_rl_core.schema import mistake

    rollouts = config.num_prompts_per_step * config.num_generations_per_prompt
    if config.updates_per_step > rollouts:
        yield mistake(
            "updates_per_step",
            f"{config.updates_per_step} minibatches need as many rollouts, and a step has {rollouts} "
            f"({config.num_prompts_per_step} prompts x {config.num_generations_per_prompt})",
            f"set updates_per_step to at most {rollouts}",
            related=("num_prompts_per_step", "num_generations_per_prompt"),
        )
    if config.max_steps is not None and config.critic_warmup_steps >= config.max_steps:
        yield mistake(
            "critic_warmup_steps",
            f"the policy is not trained in the first {config.critic_warmup_steps} steps, and the run has "
            f"{config.max_steps}",
            "lower it, or raise max_steps",
            related=("max_steps",),
        )


def _critic(config: PPOConfig) -> Iterator[Any]:
    from nemo_rl_core.schema import mistake

    schedule = config.critic.scheduler
    if schedule.name != "constant" and schedule.total_steps is None and config.max_steps is None:
        yield mistake(
            "critic.scheduler.total_steps",
            f"a {schedule.name} schedule must know when it ends, but max_steps is not set either",
            "set max_steps, or critic.scheduler.total_steps (optimizer steps of the critic)",
            related=("critic.scheduler.name",),
        )


def _loss(config: PPOConfig, loss: ClippedSurrogateConfig) -> Iterator[Any]:
    from nemo_rl_core.schema import mistake

    if config.reward_kl_beta > 0 and loss.reference_kl_beta > 0:
        yield mistake(
            "reward_kl_beta",
            f"{config.reward_kl_beta} in the reward and loss.options.reference_kl_beta={loss.reference_kl_beta} in the "
            "loss are two penalties for one thing",
            "keep one of the two",
            related=("loss.options.reference_kl_beta",),
        )
    if config.rollouts.staleness > 0 and loss.ratio_against == "step_start":
        yield mistake(
            "loss.options.ratio_against",
            f"'step_start', with rollouts up to {config.rollouts.staleness} steps old: the gradient of rollouts from "
            "other weights is biased",
            "set it to 'rollout', or take a loss with a correction, such as clipped_pg of nemo-rl-grpo",
            related=("rollouts.staleness",),
        )
