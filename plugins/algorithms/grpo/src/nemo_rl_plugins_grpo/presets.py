"""The family by its names: each a GRPO with other defaults, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from attrs import Factory, field, frozen

from nemo_rl_core.schema import ComponentChoice, component
from nemo_rl_core.schema.validators import ge, one_of
from nemo_rl_plugins_grpo.algorithm import GRPO
from nemo_rl_plugins_grpo.config import DynamicSamplingConfig, GRPOConfig, RewardKLConfig, RewardShapingConfig

__all__ = [
    "CISPO",
    "DAPO",
    "GSPO",
    "RLOO",
    "CISPOConfig",
    "DAPOConfig",
    "DAPOSamplingConfig",
    "DAPOShapingConfig",
    "DrGRPO",
    "DrGRPOConfig",
    "GSPOConfig",
    "RLOOConfig",
    "ReinforcePP",
    "ReinforcePPConfig",
    "TokenKLConfig",
]


@frozen(kw_only=True)
class DAPOSamplingConfig(DynamicSamplingConfig):
    """Dynamic sampling, on."""

    enabled: bool = True
    """Leave groups out whose rewards are all equal."""


@frozen(kw_only=True)
class DAPOShapingConfig(RewardShapingConfig):
    """Soft overlong punishment, on."""

    enabled: bool = True
    """Shape the (scaled) reward."""


@frozen(kw_only=True)
class DAPOConfig(GRPOConfig):
    """A DAPO run: `algorithm: dapo`."""

    algorithm: Any = "dapo"
    loss: ComponentChoice = component("losses", "clipped_pg", ratio_clip_min=0.2, ratio_clip_max=0.28)
    """The objective; by default with the upper bound raised and every token counting the same."""
    advantage: ComponentChoice = component("advantages", "grpo", leave_one_out=False)
    """The advantage estimator; by default the group's mean and standard deviation."""
    dynamic_sampling: DAPOSamplingConfig = Factory(DAPOSamplingConfig)
    reward_shaping: DAPOShapingConfig = Factory(DAPOShapingConfig)


class DAPO(GRPO):
    """Decoupled clip and dynamic sampling policy optimisation (arXiv:2503.14476)."""

    config_class: ClassVar[type] = DAPOConfig
    example: ClassVar[Mapping[str, Any]] = {"config": {"dynamic_sampling": {"max_batches": 30}}}
    conformance: ClassVar[Mapping[str, Any]] = {"learning_steps": 5, "reward_margin": 0.1}
    """For its kit: later on all groups are right, and none can be trained on."""


@frozen(kw_only=True)
class GSPOConfig(GRPOConfig):
    """A GSPO run: `algorithm: gspo`."""

    algorithm: Any = "gspo"
    loss: ComponentChoice = component("losses", "gspo")
    """The objective; by default with ratios of whole sequences."""
    advantage: ComponentChoice = component("advantages", "grpo", leave_one_out=False)
    """The advantage estimator; by default the group's mean and standard deviation."""


class GSPO(GRPO):
    """Group sequence policy optimisation (arXiv:2507.18071)."""

    config_class: ClassVar[type] = GSPOConfig


@frozen(kw_only=True)
class CISPOConfig(GRPOConfig):
    """A CISPO run: `algorithm: cispo`."""

    algorithm: Any = "cispo"
    loss: ComponentChoice = component("losses", "cispo")
    """The objective; by default with bounded weights in place of a clip."""
    advantage: ComponentChoice = component("advantages", "grpo", leave_one_out=False)
    """The advantage estimator; by default the group's mean and standard deviation."""


class CISPO(GRPO):
    """Clipped importance sampling policy optimisation (MiniMax-M1, arXiv:2506.13585)."""

    config_class: ClassVar[type] = CISPOConfig


@frozen(kw_only=True)
class DrGRPOConfig(GRPOConfig):
    """A Dr. GRPO run: `algorithm: dr_grpo`."""

    algorithm: Any = "dr_grpo"
    loss: ComponentChoice = component("losses", "dr_grpo")
    """The objective; by default divided by the longest response, whatever the lengths are."""
    advantage: ComponentChoice = component("advantages", "grpo", normalize=False, leave_one_out=False)
    """The advantage estimator; by default reward minus the group's mean, not divided."""


class DrGRPO(GRPO):
    """GRPO done right (arXiv:2503.20783): without the two divisions that favour lengths and difficulties."""

    config_class: ClassVar[type] = DrGRPOConfig


@frozen(kw_only=True)
class RLOOConfig(GRPOConfig):
    """An RLOO run: `algorithm: rloo`."""

    algorithm: Any = "rloo"
    loss: ComponentChoice = component("losses", "reinforce")
    """The objective; by default the plain policy gradient of whole responses."""
    advantage: ComponentChoice = component("advantages", "rloo")
    """The advantage estimator; by default reward minus the mean of the group's others."""


class RLOO(GRPO):
    """REINFORCE with a leave-one-out baseline (arXiv:2402.14740)."""

    config_class: ClassVar[type] = RLOOConfig


@frozen(kw_only=True)
class TokenKLConfig(RewardKLConfig):
    """A KL to the reference policy, taken from the rewards by token."""

    beta: float = field(default=0.01, validator=ge(0))
    """Weight; 0 needs no reference model."""
    per: Literal["sequence", "token"] = field(default="token", validator=one_of("sequence", "token"))
    """token: each token's lowers the return of it and of those before it; sequence: the sum over a rollout lowers
    its reward."""


@frozen(kw_only=True)
class ReinforcePPConfig(GRPOConfig):
    """A REINFORCE++ run: `algorithm: reinforce_pp`."""

    algorithm: Any = "reinforce_pp"
    num_prompts_per_step: int = field(default=512, validator=ge(1))
    """Prompts of one step."""
    num_generations_per_prompt: int = field(default=1, validator=ge(1))
    """Rollouts of one prompt."""
    loss: ComponentChoice = component("losses", "clipped_pg")
    """The objective."""
    advantage: ComponentChoice = component("advantages", "reinforce_pp")
    """The advantage estimator; by default returns of tokens, whitened over the batch."""
    reward_kl: TokenKLConfig = Factory(TokenKLConfig)


class ReinforcePP(GRPO):
    """REINFORCE++ (arXiv:2501.03262): PPO's loss without a critic, its baseline the batch."""

    config_class: ClassVar[type] = ReinforcePPConfig
