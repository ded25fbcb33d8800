"""Configuration of a GRPO run; that of losses and advantages is in `loss_config` and `advantage_config`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from attrs import Factory, field, frozen

from nemo_rl_core.schema import ComponentChoice, Mistake, RolloutRunConfig, component, mistake
from nemo_rl_core.schema.validators import ge, gt, le, one_of, optional
from nemo_rl_plugins_grpo.advantage_config import (
    GDPOAdvantagesConfig,
    GroupRelativeConfig,
    PassAtKConfig,
    RLOOAdvantagesConfig,
)
from nemo_rl_plugins_grpo.loss_config import PolicyLossConfig, RatioLossConfig, ReinforceLossConfig

__all__ = [
    "AdvantageClipConfig",
    "DynamicSamplingConfig",
    "GRPOConfig",
    "RewardKLConfig",
    "RewardScalingConfig",
    "RewardShapingConfig",
]


@frozen(kw_only=True)
class DynamicSamplingConfig:
    """Train only on groups whose rewards vary (DAPO); others are sampled in place of the rest."""

    enabled: bool = False
    """Leave groups out whose rewards are all equal."""
    max_batches: int = field(default=10, validator=ge(1))
    """The run stops when so many times the prompts of a step did not give enough varied groups."""


@frozen(kw_only=True)
class RewardScalingConfig:
    """Clamp rewards to the source range, then map it linearly to the target range."""

    enabled: bool = False
    """Scale the reward before it is shaped."""
    source_min: float = 0.0
    """Reward that becomes `target_min`; lower ones are raised to it."""
    source_max: float = 1.0
    """Reward that becomes `target_max`; higher ones are lowered to it."""
    target_min: float = 0.0
    """What `source_min` becomes."""
    target_max: float = 1.0
    """What `source_max` becomes."""


@frozen(kw_only=True)
class RewardShapingConfig:
    """Make long or truncated responses worth less."""

    enabled: bool = False
    """Shape the (scaled) reward."""
    overlong_buffer_length: int | None = field(default=None, validator=optional(ge(1)))
    """Tokens before the maximum over which the penalty rises from 0 (DAPO's soft overlong punishment); None is a
    fifth of the maximum, as there."""
    overlong_penalty: float = field(default=1.0, validator=ge(0))
    """Penalty at the maximal length."""
    max_response_length: int | None = field(default=None, validator=optional(ge(1)))
    """None is `generation.max_new_tokens`."""
    stop_properly_penalty_coef: float | None = field(default=None, validator=optional([ge(0), le(1)]))
    """If set, the rewards of truncated rollouts are multiplied by it, in place of the penalty by length."""


@frozen(kw_only=True)
class RewardKLConfig:
    """A KL to the reference policy, taken from the (shaped) rewards before the advantages."""

    beta: float = field(default=0.0, validator=ge(0))
    """Weight; 0 needs no reference model."""
    type: Literal["k1", "k2", "k3"] = field(default="k1", validator=one_of("k1", "k2", "k3"))
    """Estimator; in a reward k1 has the right gradient, and the others do not."""
    per: Literal["sequence", "token"] = field(default="sequence", validator=one_of("sequence", "token"))
    """sequence: the sum over a rollout lowers its reward, and so its group's baseline (RLOO); token: each token's
    lowers the return of it and of those before it (REINFORCE++), for estimators that take rewards by token."""
    clamp: float = field(default=20.0, validator=gt(0))
    """Bound on the log-ratio of a token."""


@frozen(kw_only=True)
class AdvantageClipConfig:
    """Bounds on the advantages, after normalisation."""

    low: float | None = None
    """Lower bound. None sets no bound."""
    high: float | None = None
    """Upper bound. None sets no bound."""


@frozen(kw_only=True)
class GRPOConfig(RolloutRunConfig):
    """A GRPO run: `algorithm: grpo`."""

    algorithm: Any = "grpo"
    updates_per_step: int = field(default=1, validator=ge(1))
    """Optimizer steps per pass over the rollouts of a step; each takes whole groups."""
    epochs_per_step: int = field(default=1, validator=ge(1))
    """Passes over the rollouts of a step."""
    loss: ComponentChoice = component("losses", "clipped_pg")
    """The objective."""
    advantage: ComponentChoice = component("advantages", "grpo")
    """The advantage estimator."""
    dynamic_sampling: DynamicSamplingConfig = Factory(DynamicSamplingConfig)
    overlong_filtering: bool = False
    """Do not train on truncated rollouts; they still count in their group's baseline."""
    reward_scaling: RewardScalingConfig = Factory(RewardScalingConfig)
    reward_shaping: RewardShapingConfig = Factory(RewardShapingConfig)
    reward_kl: RewardKLConfig = Factory(RewardKLConfig)
    advantage_clip: AdvantageClipConfig = Factory(AdvantageClipConfig)

    @property
    def max_response_length(self) -> int:
        """Tokens a response may have, for shaping by length."""
        shaping, generation = self.reward_shaping, self.generation
        return shaping.max_response_length or generation.max_new_tokens or self.policy.max_sequence_length

    @property
    def overlong_buffer_length(self) -> int:
        """Tokens over which the penalty for length rises."""
        return self.reward_shaping.overlong_buffer_length or max(1, self.max_response_length // 5)

    @property
    def max_batches_per_step(self) -> int:
        """Batches of prompts that dynamic sampling may draw for one step."""
        return self.dynamic_sampling.max_batches

    @property
    def num_updates_per_step(self) -> int:
        """Optimizer steps of one step."""
        return self.updates_per_step * self.epochs_per_step

    @property
    def num_passes_per_step(self) -> int:
        """How often each rollout is trained on."""
        return self.epochs_per_step

    def check(self) -> Iterator[Mistake]:
        """Yield every mistake that lies between fields, each with its path, value and fix."""
        return _mistakes(self)


# -- mistakes between the fields ------------------------------------------------------------------------------

_COMPARE_IN_GROUPS = (GroupRelativeConfig, RLOOAdvantagesConfig, GDPOAdvantagesConfig, PassAtKConfig)
"""Options of estimators that compare the rollouts of a prompt, and take no rewards by token."""


def _mistakes(config: GRPOConfig) -> Iterator[Mistake]:
    """Yield a mistake for each combination of fields that cannot be meant.

    Options of another loss or estimator than ours are not judged here.
    """
    yield from _group_size(config)
    yield from _steps(config)
    yield from _rewards(config)
    yield from _estimator(config)
    if isinstance(config.loss.options, PolicyLossConfig):
        yield from _loss(config, config.loss.options)


def _group_size(config: GRPOConfig) -> Iterator[Mistake]:
    ours = config.advantage.name == "grpo" or isinstance(config.advantage.options, _COMPARE_IN_GROUPS)
    if config.num_generations_per_prompt == 1 and (ours or config.dynamic_sampling.enabled):
        yield mistake(
            "num_generations_per_prompt",
            "1 rollout per prompt: a lone rollout has no group to be compared with, so every advantage is 0",
            "set it to 2 or more (8 and 16 are usual)",
            related=("advantage.name",),
        )


def _steps(config: GRPOConfig) -> Iterator[Mistake]:
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


def _rewards(config: GRPOConfig) -> Iterator[Mistake]:
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


def _estimator(config: GRPOConfig) -> Iterator[Mistake]:
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


def _loss(config: GRPOConfig, loss: PolicyLossConfig) -> Iterator[Mistake]:
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
