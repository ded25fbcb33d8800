"""Options of the policy-gradient losses: what all share, and what each has of its own."""

from __future__ import annotations

from typing import Any, Literal

from attrs import Attribute, field, frozen

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.schema.validators import ge, gt, le, one_of, optional

__all__ = [
    "CISPOLossConfig",
    "ClippedPGConfig",
    "DrGRPOLossConfig",
    "GSPOLossConfig",
    "PolicyLossConfig",
    "RatioLossConfig",
    "ReinforceLossConfig",
]

Aggregation = Literal["token", "sequence", "sum", "constant"]
Correction = Literal["none", "importance", "tis", "icepop", "seq_mask_tis"]
KLType = Literal["k1", "k2", "k3"]
KLGradient = Literal["unbiased", "importance", "direct"]

_AGGREGATIONS = ("token", "sequence", "sum", "constant")
_CORRECTIONS = ("none", "importance", "tis", "icepop", "seq_mask_tis")
_NEEDS_MAX = ("tis", "icepop", "seq_mask_tis")
_NEEDS_MIN = ("icepop", "seq_mask_tis")


def _bound_is_given(needing: tuple[str, ...]) -> Any:
    """A validator: the correction named in `needing` is useless without this bound."""

    def check(instance: PolicyLossConfig, attribute: Attribute[Any], value: float | None) -> None:
        if value is None and instance.correction in needing:
            raise ConfigError(f"correction {instance.correction!r} needs {attribute.name}; it is not set")
        if value is not None and instance.correction not in needing and instance.correction != "tis":
            raise ConfigError(
                f"{attribute.name}={value} has no effect with correction {instance.correction!r}; "
                f"remove it, or choose a correction of {', '.join(needing)}"
            )

    return check


def _ordered(instance: PolicyLossConfig, attribute: Attribute[Any], value: float | None) -> None:
    low = instance.correction_min
    if value is not None and low is not None and low > value:
        raise ConfigError(f"correction_min={low} is above correction_max={value}; exchange them")


def _one_correction(instance: RatioLossConfig, attribute: Attribute[Any], value: str) -> None:
    if value == "rollout" and instance.correction != "none":
        raise ConfigError(
            "ratio_against 'rollout' already holds the importance of the sampling policy; "
            "set correction to 'none', or ratio_against to 'step_start'"
        )


def _length_for_constant(instance: PolicyLossConfig, attribute: Attribute[Any], value: int | None) -> None:
    if value is not None and instance.aggregation != "constant":
        raise ConfigError(
            f"constant_length={value} has no effect with aggregation {instance.aggregation!r}; "
            "remove it, or set aggregation to 'constant'"
        )


def _no_sequence_mask(instance: PolicyLossConfig, attribute: Attribute[Any], value: str) -> None:
    if value == "seq_mask_tis":
        raise ConfigError("the weights of this loss are those of sequences already; set correction to 'icepop'")


@frozen(kw_only=True)
class PolicyLossConfig:
    """What every policy-gradient loss has: how terms are added up, the KL, the correction, the NLL of successes."""

    aggregation: Aggregation = field(default="token", validator=one_of(*_AGGREGATIONS))
    """token: every trained token of the global batch counts the same (DAPO); sequence: every sequence
    does, by the mean over its tokens (original GRPO); sum: the sum over tokens, mean over sequences (REINFORCE);
    constant: that sum divided by constant_length (Dr. GRPO)."""
    constant_length: int | None = field(default=None, validator=[optional(ge(1)), _length_for_constant])
    """Divisor of aggregation `constant`, in tokens; None is the longest response that the run allows."""
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
    correction: Correction = field(default="none", validator=one_of(*_CORRECTIONS))
    """Weight for the mismatch of trainer and engine: none; importance: exp(trainer - engine) as it is;
    tis: clamped to the bounds; icepop: tokens outside the bounds dropped; seq_mask_tis: sequences whose
    mean (geometric) weight is outside the bounds dropped."""
    correction_min: float | None = field(default=None, validator=[optional(ge(0)), _bound_is_given(_NEEDS_MIN)])
    """Lower bound; for tis None is 0."""
    correction_max: float | None = field(
        default=None, validator=[optional(gt(0)), _bound_is_given(_NEEDS_MAX), _ordered]
    )
    """Upper bound."""
    positive_nll_weight: float = field(default=0.0, validator=ge(0))
    """Weight of a further term, the negative log-likelihood of responses that were rewarded (VAPO takes 0.1)."""
    positive_nll_threshold: float = 0.0
    """A response was rewarded if its reward, before shaping, is above this."""


@frozen(kw_only=True)
class ReinforceLossConfig(PolicyLossConfig):
    """Options of the loss `reinforce`."""

    aggregation: Aggregation = field(default="sum", validator=one_of(*_AGGREGATIONS))
    """sum: the logprob of a whole response, mean over sequences (REINFORCE, RLOO); token: every trained token of
    the global batch counts the same; sequence: the mean over a sequence's tokens; constant: the sum divided by
    constant_length."""


@frozen(kw_only=True)
class RatioLossConfig(PolicyLossConfig):
    """What every loss with an importance ratio has."""

    ratio_clip_min: float = field(default=0.2, validator=[ge(0), le(1)])
    """The ratio is held above 1 - ratio_clip_min (where the advantage is negative)."""
    ratio_clip_max: float = field(default=0.2, validator=ge(0))
    """The ratio is held below 1 + ratio_clip_max (where the advantage is positive); raise it alone for
    clip-higher (DAPO takes 0.28)."""
    force_on_policy_ratio: bool = False
    """Take the ratio as 1 (with its gradient) even when `logprobs` are in the batch."""
    ratio_against: Literal["step_start", "rollout"] = field(
        default="step_start", validator=[one_of("step_start", "rollout"), _one_correction]
    )
    """Denominator of the ratio: the policy before this step's updates (three policies, mismatch left to
    `correction`), or the logprobs of the engine (two policies, mismatch inside the ratio)."""


@frozen(kw_only=True)
class ClippedPGConfig(RatioLossConfig):
    """Options of the loss `clipped_pg`."""

    ratio_clip_c: float | None = field(default=None, validator=optional(gt(1)))
    """Dual clip: where the advantage is negative the term never exceeds -advantage * ratio_clip_c."""


@frozen(kw_only=True)
class DrGRPOLossConfig(ClippedPGConfig):
    """Options of the loss `dr_grpo`."""

    aggregation: Aggregation = field(default="constant", validator=one_of(*_AGGREGATIONS))
    """As of `clipped_pg`; constant: sum over tokens / constant_length, mean over sequences."""


@frozen(kw_only=True)
class GSPOLossConfig(RatioLossConfig):
    """Options of the loss `gspo`."""

    aggregation: Aggregation = field(default="sequence", validator=one_of(*_AGGREGATIONS))
    """As of `clipped_pg`; sequence: every sequence counts the same (GSPO)."""
    ratio_clip_min: float = field(default=3e-4, validator=[ge(0), le(1)])
    """The ratio of a sequence is held above 1 - ratio_clip_min (where the advantage is negative)."""
    ratio_clip_max: float = field(default=4e-4, validator=ge(0))
    """The ratio of a sequence is held below 1 + ratio_clip_max (where the advantage is positive)."""
    length_normalized: bool = True
    """The ratio is the geometric mean over a sequence's tokens (GSPO); False: their product, as PPO on whole
    responses has it, which needs far wider bounds."""
    correction: Correction = field(default="none", validator=[one_of(*_CORRECTIONS), _no_sequence_mask])
    """As of `clipped_pg`, with the weight of a whole sequence formed like its ratio; icepop drops sequences."""


@frozen(kw_only=True)
class CISPOLossConfig(RatioLossConfig):
    """Options of the loss `cispo`."""

    ratio_clip_min: float = field(default=1.0, validator=[ge(0), le(1)])
    """The weight is held above 1 - ratio_clip_min; 1 is no lower bound."""
    ratio_clip_max: float = field(default=4.0, validator=ge(0))
    """The weight is held below 1 + ratio_clip_max."""
