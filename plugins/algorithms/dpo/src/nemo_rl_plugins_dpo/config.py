"""Configuration of preference optimisation and of its losses: every default in one place."""

from __future__ import annotations

from typing import Any, Literal

from attrs import field, frozen

from nemo_rl_core.schema import ComponentChoice, RunConfig, component
from nemo_rl_core.schema.validators import ge, gt, lt, one_of

__all__ = [
    "DPOConfig",
    "DPOLossConfig",
    "IPOConfig",
    "KTOConfig",
    "ORPOConfig",
    "RPOConfig",
    "SimPOConfig",
    "SmoothedDPOConfig",
]

TrainOn = Literal["last_assistant", "assistant"]


@frozen(kw_only=True)
class DPOLossConfig:
    """Options of the losses `dpo`, `dpo_hinge` and `dpo_norm`."""

    beta: float = field(default=0.1, validator=gt(0))
    """How strongly the policy is held to the reference: the implicit reward is beta times the log-ratio."""
    nll_weight: float = field(default=0.0, validator=ge(0))
    """Weight of the chosen answer's negative log likelihood, the mean over its tokens, added to the loss."""


@frozen(kw_only=True)
class RPOConfig(DPOLossConfig):
    """Options of the loss `rpo`."""

    nll_weight: float = field(default=1.0, validator=ge(0))
    """Weight of the chosen answer's negative log likelihood, the mean over its tokens (alpha of the paper)."""


@frozen(kw_only=True)
class SmoothedDPOConfig(DPOLossConfig):
    """Options of the losses `cdpo` and `robust_dpo`."""

    label_smoothing: float = field(default=0.1, validator=[ge(0), lt(0.5)])
    """Probability that a preference is the wrong way round."""


@frozen(kw_only=True)
class IPOConfig(DPOLossConfig):
    """Options of the loss `ipo`."""

    average_logprobs: bool = True
    """Compare log-ratios per token, so that long answers do not weigh more; False takes their sums."""


@frozen(kw_only=True)
class KTOConfig:
    """Options of the loss `kto`."""

    beta: float = field(default=0.1, validator=gt(0))
    """The implicit reward is beta times the log-ratio."""
    desirable_weight: float = field(default=1.0, validator=ge(0))
    """Weight of good answers."""
    undesirable_weight: float = field(default=1.0, validator=ge(0))
    """Weight of bad answers. The paper keeps the two sums, weight times count, within a ratio of 1 to 4/3."""


@frozen(kw_only=True)
class ORPOConfig:
    """Options of the loss `orpo`."""

    beta: float = field(default=0.1, validator=gt(0))
    """Weight of the odds ratio beside the likelihood (lambda of the paper)."""


@frozen(kw_only=True)
class SimPOConfig:
    """Options of the loss `simpo`."""

    beta: float = field(default=2.0, validator=gt(0))
    """The reward is beta times the mean logprob of the answer's tokens."""
    gamma: float = field(default=1.0, validator=ge(0))
    """Margin by which the rewards are to differ; the paper takes 0.3 to 0.8 of beta."""
    nll_weight: float = field(default=0.0, validator=ge(0))
    """Weight of the chosen answer's negative log likelihood, the mean over its tokens (as in CPO-SimPO)."""


@frozen(kw_only=True)
class DPOConfig(RunConfig):
    """A run of preference optimisation: `algorithm: dpo`."""

    algorithm: Any = "dpo"
    batch_size: int = field(default=32, validator=ge(1))
    """Rows of one optimizer step: pairs, or labelled answers of the loss `kto`."""
    train_on: TrainOn = field(default="last_assistant", validator=one_of("last_assistant", "assistant"))
    """Tokens that are compared: those of the last assistant turn, or of every one, the prompt's included."""
    loss: ComponentChoice = component("losses", "dpo")
    """The objective."""

    @property
    def num_items_per_step(self) -> int:
        """Rows of one step."""
        return self.batch_size
