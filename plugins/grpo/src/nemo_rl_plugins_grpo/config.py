"""Configuration of GRPO, of its loss and of its advantages: every default in one place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from attrs import Attribute, Factory, field, frozen

from nemo_rl_core._errors import ConfigError
from nemo_rl_core.config.schema import ComponentChoice, RunConfig, component
from nemo_rl_core.config.validators import ge, gt, le, one_of, optional

__all__ = [
    "AdvantageClipConfig",
    "ClippedPGConfig",
    "DynamicSamplingConfig",
    "GRPOConfig",
    "GroupRelativeConfig",
    "RewardScalingConfig",
    "RewardShapingConfig",
]

Aggregation = Literal["token", "sequence", "constant"]
Correction = Literal["none", "importance", "tis", "icepop", "seq_mask_tis"]
KLType = Literal["k1", "k2", "k3"]
KLGradient = Literal["unbiased", "importance", "direct"]

_NEEDS_MAX = ("tis", "icepop", "seq_mask_tis")
_NEEDS_MIN = ("icepop", "seq_mask_tis")


def _bound_is_given(needing: tuple[str, ...]) -> Any:
    """A validator: the correction named in `needing` is useless without this bound."""

    def check(instance: ClippedPGConfig, attribute: Attribute[Any], value: float | None) -> None:
        if value is None and instance.correction in needing:
            raise ConfigError(f"correction {instance.correction!r} needs {attribute.name}; it is not set")
        if value is not None and instance.correction not in needing and instance.correction != "tis":
            raise ConfigError(
                f"{attribute.name}={value} has no effect with correction {instance.correction!r}; "
                f"remove it, or choose a correction of {', '.join(needing)}"
            )

    return check


def _ordered(instance: ClippedPGConfig, attribute: Attribute[Any], value: float | None) -> None:
    low = instance.correction_min
    if value is not None and low is not None and low > value:
        raise ConfigError(f"correction_min={low} is above correction_max={value}; exchange them")


def _no_ratio_options(instance: ClippedPGConfig, attribute: Attribute[Any], value: bool) -> None:
    if value and instance.ratio_clip_c is not None:
        raise ConfigError("disable_ratio leaves no ratio to bound; remove ratio_clip_c")
    if value and instance.force_on_policy_ratio:
        raise ConfigError("disable_ratio and force_on_policy_ratio exclude each other; keep one")


def _one_correction(instance: ClippedPGConfig, attribute: Attribute[Any], value: str) -> None:
    if value == "rollout" and instance.correction != "none":
        raise ConfigError(
            "ratio_against 'rollout' already holds the importance of the sampling policy; "
            "set correction to 'none', or ratio_against to 'step_start'"
        )


def _length_for_constant(instance: ClippedPGConfig, attribute: Attribute[Any], value: int | None) -> None:
    if (value is None) == (instance.aggregation == "constant"):
        raise ConfigError(
            "aggregation 'constant' divides by constant_length; "
            + ("set it, such as to generation.max_new_tokens" if value is None else "remove it, or set aggregation")
        )


@frozen(kw_only=True)
class ClippedPGConfig:
    """Options of the loss `clipped_pg`."""

    ratio_clip_min: float = field(default=0.2, validator=[ge(0), le(1)])
    """The ratio is held above 1 - ratio_clip_min (where the advantage is negative)."""
    ratio_clip_max: float = field(default=0.2, validator=ge(0))
    """The ratio is held below 1 + ratio_clip_max (where the advantage is positive); raise it alone for
    clip-higher (DAPO takes 0.28)."""
    ratio_clip_c: float | None = field(default=None, validator=optional(gt(1)))
    """Dual clip: where the advantage is negative the term never exceeds -advantage * ratio_clip_c."""
    aggregation: Aggregation = field(default="token", validator=one_of("token", "sequence", "constant"))
    """token: every trained token of the global batch counts the same (DAPO); sequence: every sequence
    does, by the mean over its tokens (original GRPO); constant: sum over tokens / constant_length, mean
    over sequences (Dr. GRPO)."""
    constant_length: int | None = field(default=None, validator=[optional(ge(1)), _length_for_constant])
    """Divisor of aggregation `constant`, in tokens."""
    disable_ratio: bool = field(default=False, validator=_no_ratio_options)
    """REINFORCE: -advantage * logprob, no ratio and no clip."""
    force_on_policy_ratio: bool = False
    """Take the ratio as 1 (with its gradient) even when `logprobs` are in the batch."""
    ratio_against: Literal["step_start", "rollout"] = field(
        default="step_start", validator=[one_of("step_start", "rollout"), _one_correction]
    )
    """Denominator of the ratio: the policy before this step's updates (three policies, mismatch left to
    `correction`), or the logprobs of the engine (two policies, mismatch inside the ratio)."""
    reference_kl_beta: float = field(default=0.0, validator=ge(0))
    """Weight of the KL to the reference policy; 0 needs no reference model."""
    reference_kl_type: KLType = field(default="k3", validator=one_of("k1", "k2", "k3"))
    """Estimator of the KL's value."""
    reference_kl_gradient: KLGradient = field(default="unbiased", validator=one_of("unbiased", "importance", "direct"))
    """unbiased: differentiates the expectation (a score-function weight of value 1); importance: the same,
    weighted by current over sampling policy; direct: differentiates the estimator alone (k1 then has zero
    expected gradient, k3 that of the other direction's KL)."""
    kl_input_clamp: float = field(default=20.0, validator=gt(0))
    """Bound on the log-ratio inside the KL."""
    kl_output_clamp: float = field(default=10.0, validator=gt(0))
    """Bound on the KL of a token."""
    correction: Correction = field(
        default="none", validator=one_of("none", "importance", "tis", "icepop", "seq_mask_tis")
    )
    """Weight for the mismatch of trainer and engine: none; importance: exp(trainer - engine) as it is;
    tis: clamped to the bounds; icepop: tokens outside the bounds dropped; seq_mask_tis: sequences whose
    mean (geometric) weight is outside the bounds dropped."""
    correction_min: float | None = field(default=None, validator=[optional(ge(0)), _bound_is_given(_NEEDS_MIN)])
    """Lower bound; for tis None is 0."""
    correction_max: float | None = field(
        default=None, validator=[optional(gt(0)), _bound_is_given(_NEEDS_MAX), _ordered]
    )
    """Upper bound."""


@frozen(kw_only=True)
class GroupRelativeConfig:
    """Options of the advantages `grpo`."""

    normalize: bool = True
    """Divide by the group's standard deviation; False is Dr. GRPO's."""
    leave_one_out: bool = True
    """Baseline and deviation of a rollout come from the others of its group; False: from all of it."""
    epsilon: float = field(default=1e-6, validator=gt(0))
    """Added to the standard deviation."""


@frozen(kw_only=True)
class DynamicSamplingConfig:
    """Train only on groups whose rewards vary (DAPO); others are sampled in place of the rest."""

    enabled: bool = False
    """Leave groups out whose rewards are all equal."""
    max_batches: int = field(default=10, validator=ge(1))
    """The run stops when so many batches of prompts did not give one batch of varied groups."""


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
    overlong_buffer_length: int = field(default=128, validator=ge(1))
    """Tokens before the maximum over which the penalty rises from 0 (DAPO's soft overlong punishment)."""
    overlong_penalty: float = field(default=1.0, validator=ge(0))
    """Penalty at the maximal length."""
    max_response_length: int | None = field(default=None, validator=optional(ge(1)))
    """None is `generation.max_new_tokens`."""
    stop_properly_penalty_coef: float | None = field(default=None, validator=optional([ge(0), le(1)]))
    """If set, the rewards of truncated rollouts are multiplied by it, in place of the penalty by length."""


@frozen(kw_only=True)
class AdvantageClipConfig:
    """Bounds on the advantages, after normalisation."""

    low: float | None = None
    """Lower bound; None is none."""
    high: float | None = None
    """Upper bound; None is none."""


@frozen(kw_only=True)
class GRPOConfig(RunConfig):
    """A GRPO run: `algorithm: grpo`."""

    algorithm: Any = "grpo"
    num_prompts_per_step: int = field(default=32, validator=ge(1))
    """Prompts (groups) of one step."""
    num_generations_per_prompt: int = field(default=16, validator=ge(1))
    """Rollouts of one prompt (group size)."""
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
    advantage_clip: AdvantageClipConfig = Factory(AdvantageClipConfig)

    @property
    def num_items_per_step(self) -> int:
        """Prompts of one step."""
        return self.num_prompts_per_step

    @property
    def group_size(self) -> int:
        """Rollouts per prompt."""
        return self.num_generations_per_prompt

    @property
    def max_response_length(self) -> int:
        """Tokens a response may have, for shaping by length."""
        shaping, generation = self.reward_shaping, self.generation
        return shaping.max_response_length or generation.max_new_tokens or self.policy.max_sequence_length

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

    def check(self) -> Iterator[Any]:
        """Yield every mistake that lies between fields, each with its path, value and fix."""
        from nemo_rl_plugins_grpo.checks import find_mistakes

        return find_mistakes(self)
