"""Mistakes between the fields of a `GRPOConfig`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_rl_plugins_grpo.config import ClippedPGConfig, GroupRelativeConfig, GRPOConfig

__all__ = ["find_mistakes"]


def find_mistakes(config: GRPOConfig) -> Iterator[Any]:
    """Yield a `Mistake` of the core for each combination of fields that cannot be meant.

    Options of another loss or estimator than ours are not judged here.
    """
    yield from _group_size(config)
    yield from _steps(config)
    yield from _rewards(config)
    if isinstance(config.loss.options, ClippedPGConfig):
        yield from _loss(config, config.loss.options)


def _group_size(config: GRPOConfig) -> Iterator[Any]:
    from nemo_rl_core.config import mistake

    ours = config.advantage.name == "grpo" or isinstance(config.advantage.options, GroupRelativeConfig)
    if config.num_generations_per_prompt == 1 and (ours or config.dynamic_sampling.enabled):
        yield mistake(
            "num_generations_per_prompt",
            "1 rollout per prompt: a lone rollout has no group to be compared with, so every advantage is 0",
            "set it to 2 or more (8 and 16 are usual)",
            related=("advantage.name",),
        )


def _steps(config: GRPOConfig) -> Iterator[Any]:
    from nemo_rl_core.config import mistake

    if config.updates_per_step > config.num_prompts_per_step:
        yield mistake(
            "updates_per_step",
            f"{config.updates_per_step} optimizer steps need as many groups, and a step has "
            f"{config.num_prompts_per_step} (num_prompts_per_step)",
            f"set updates_per_step to at most {config.num_prompts_per_step}, or raise num_prompts_per_step",
            related=("num_prompts_per_step",),
        )
    clip = config.advantage_clip
    if clip.low is not None and clip.high is not None and clip.low > clip.high:
        yield mistake("advantage_clip.low", f"{clip.low} is above advantage_clip.high={clip.high}", "exchange them")


def _rewards(config: GRPOConfig) -> Iterator[Any]:
    from nemo_rl_core.config import mistake

    scaling, shaping = config.reward_scaling, config.reward_shaping
    if scaling.enabled and not scaling.source_min < scaling.source_max:
        yield mistake(
            "reward_scaling.source_max",
            f"the source range {scaling.source_min} to {scaling.source_max} is empty",
            "make source_max larger than source_min",
        )
    longest = config.max_response_length
    by_length = shaping.enabled and shaping.stop_properly_penalty_coef is None
    if by_length and shaping.overlong_buffer_length > longest:
        yield mistake(
            "reward_shaping.overlong_buffer_length",
            f"{shaping.overlong_buffer_length} tokens of buffer exceed the longest response, {longest} tokens",
            f"set it below {longest}, or raise generation.max_new_tokens",
            related=("generation.max_new_tokens",),
        )


def _loss(config: GRPOConfig, loss: ClippedPGConfig) -> Iterator[Any]:
    from nemo_rl_core.config import mistake

    updates = config.updates_per_step * config.epochs_per_step
    if loss.force_on_policy_ratio and updates > 1:
        yield mistake(
            "loss.options.force_on_policy_ratio",
            f"the ratio is 1 only for the first of the {updates} optimizer steps that take one batch of rollouts",
            "remove it, or set updates_per_step and epochs_per_step to 1",
            related=("updates_per_step", "epochs_per_step"),
        )
    corrected = loss.correction != "none" or loss.ratio_against == "rollout"
    if config.rollouts.staleness > 0 and not corrected:
        yield mistake(
            "loss.options.correction",
            f"'none', with rollouts up to {config.rollouts.staleness} steps old: the gradient of rollouts from other "
            "weights is biased",
            "set correction to 'tis' with correction_max (2.0 is usual), or ratio_against to 'rollout'",
            related=("rollouts.staleness",),
        )
