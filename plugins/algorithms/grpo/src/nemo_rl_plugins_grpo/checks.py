"""Mistakes between the fields of a `GRPOConfig`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_rl_plugins_grpo.advantage_config import (
    GDPOAdvantagesConfig,
    GroupRelativeConfig,
    PassAtKConfig,
    RLOOAdvantagesConfig,
)
from nemo_rl_plugins_grpo.config import GRPOConfig
from nemo_rl_plugins_grpo.loss_config import PolicyLossConfig, RatioLossConfig, ReinforceLossConfig

__all__ = ["find_mistakes"]

_COMPARE_IN_GROUPS = (GroupRelativeConfig, RLOOAdvantagesConfig, GDPOAdvantagesConfig, PassAtKConfig)
"""Options of estimators that compare the rollouts of a prompt, and take no rewards by token."""


def find_mistakes(config: GRPOConfig) -> Iterator[Any]:
    """Yield a `Mistake` of the core for each combination of fields that cannot be meant.

    Options of another loss or estimator than ours are not judged here.
    """
    yield from _group_size(config)
    yield from _steps(config)
    yield from _rewards(config)
    yield from _estimator(config)
    if isinstance(config.loss.options, PolicyLossConfig):
        yield from _loss(config, config.loss.options)


def _group_size(config: GRPOConfig) -> Iterator[Any]:
    from nemo_rl_core.schema import mistake

    ours = config.advantage.name == "grpo" or isinstance(config.advantage.options, _COMPARE_IN_GROUPS)
    if config.num_generations_per_prompt == 1 and (ours or config.dynamic_sampling.enabled):
        yield mistake(
            "num_generations_per_prompt",
            "1 rollout per prompt: a lone rollout has no group to be compared with, so every advantage is 0",
            "set it to 2 or more (8 and 16 are usual)",
            related=("advantage.name",),
        )


def _steps(config: GRPOConfig) -> Iterator[Any]:
    from nemo_rl_core.schema import mistake

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
    from nemo_rl_core.schema import mistake

    scaling, shaping = config.reward_scaling, config.reward_shaping
    if scaling.enabled and not scaling.source_min < scaling.source_max:
        yield mistake(
            "reward_scaling.source_max",
            f"the source range {scaling.source_min} to {scaling.source_max} is empty",
            "make source_max larger than source_min",
        )
    longest = config.max_response_length
    by_length = shaping.enabled and shaping.stop_properly_penalty_coef is None
    if by_length and config.overlong_buffer_length > longest:
        yield mistake(
            "reward_shaping.overlong_buffer_length",
            f"{config.overlong_buffer_length} tokens of buffer exceed the longest response, {longest} tokens",
            f"set it below {longest}, or raise generation.max_new_tokens",
            related=("generation.max_new_tokens",),
        )


def _estimator(config: GRPOConfig) -> Iterator[Any]:
    from nemo_rl_core.schema import mistake

    options, kl = config.advantage.options, config.reward_kl
    if kl.beta > 0 and kl.per == "token" and isinstance(options, _COMPARE_IN_GROUPS):
        yield mistake(
            "reward_kl.per",
            f"'token', and the advantages {config.advantage.name!r} give a response one number",
            "set it to 'sequence', or advantage.name to 'reinforce_pp'",
            related=("advantage.name",),
        )
    changed = [
        name
        for name, on in (
            ("reward_scaling", config.reward_scaling.enabled),
            ("reward_shaping", config.reward_shaping.enabled),
            ("reward_kl", kl.beta > 0),
        )
        if on
    ]
    if isinstance(options, GDPOAdvantagesConfig) and changed:
        yield mistake(
            changed[0],
            "it changes the sum of the rewards, and the advantages 'gdpo' read the named rewards one by one",
            "remove it; shape the named rewards in the reward function, or put the KL into the loss",
            related=("advantage.name",),
        )


def _loss(config: GRPOConfig, loss: PolicyLossConfig) -> Iterator[Any]:
    from nemo_rl_core.schema import mistake

    updates = config.updates_per_step * config.epochs_per_step
    has_ratio = isinstance(loss, RatioLossConfig)
    if isinstance(loss, RatioLossConfig) and loss.force_on_policy_ratio and updates > 1:
        yield mistake(
            "loss.options.force_on_policy_ratio",
            f"the ratio is 1 only for the first of the {updates} optimizer steps that take one batch of rollouts",
            "remove it, or set updates_per_step and epochs_per_step to 1",
            related=("updates_per_step", "epochs_per_step"),
        )
    if isinstance(loss, ReinforceLossConfig) and updates > 1:
        yield mistake(
            "loss.name",
            f"'reinforce' has no ratio, and is right only for the first of the {updates} optimizer steps that take "
            "one batch of rollouts",
            "choose 'clipped_pg', 'gspo' or 'cispo', or set updates_per_step and epochs_per_step to 1",
            related=("updates_per_step", "epochs_per_step"),
        )
    corrected = loss.correction != "none" or (isinstance(loss, RatioLossConfig) and loss.ratio_against == "rollout")
    if config.rollouts.staleness > 0 and not corrected:
        yield mistake(
            "loss.options.correction",
            f"'none', with rollouts up to {config.rollouts.staleness} steps old: the gradient of rollouts from other "
            "weights is biased",
            "set correction to 'tis' with correction_max (2.0 is usual) to truncate the importance weights, or to "
            "'icepop' or 'seq_mask_tis' with correction_min and correction_max to mask tokens or sequences"
            + (", or ratio_against to 'rollout'" if has_ratio else ""),
            related=("rollouts.staleness",),
        )
