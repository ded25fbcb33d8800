"""Configuration of a GRPO run; that of losses and advantages is in `loss_config` and `advantage_config`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from attrs import Factory, field, frozen

from nemo_rl_core.schema import ComponentChoice, RolloutRunConfig, component
from nemo_rl_core.schema.validators import ge, gt, le, one_of, optional

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

    def check(self) -> Iterator[Any]:
        """Yield every mistake that lies between fields, each with its path, value and fix."""
        from nemo_rl_plugins_grpo.checks import find_mistakes

        return find_mistakes(self)
