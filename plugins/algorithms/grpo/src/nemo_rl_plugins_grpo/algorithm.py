"""GRPO: rollouts in groups, advantages within a group, a clipped policy-gradient step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from attrs import evolve

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.algorithm import AlgorithmContext, BaseAlgorithm, ModelRole
from nemo_rl_plugins_grpo.config import GRPOConfig
from nemo_rl_plugins_grpo.loss_config import PolicyLossConfig

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_rl_core.protocols.advantage import AdvantageEstimator
    from nemo_rl_core.protocols.loss import Loss
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_core.records.rollout import RolloutGroup
    from nemo_rl_core.schema import ComponentChoice

__all__ = ["GRPO"]


class GRPO(BaseAlgorithm):
    """Group relative policy optimisation (arXiv:2402.03300) with the options of DAPO and Dr. GRPO.

    The loss and the advantage estimator are components chosen by the configuration. A loss that has a
    set `required_fields` gets those fields: "ref_logprobs" brings the reference role, "logprobs" (the
    policy before the step) only when one batch of rollouts takes several optimizer steps, as with one
    step they equal the current logprobs.
    """

    config_class: ClassVar[type] = GRPOConfig

    def __init__(self, config: GRPOConfig, context: AlgorithmContext) -> None:
        super().__init__(config, context)
        self.loss: Loss = context.resolve("losses", _with_constant_length(config))
        self.advantages: AdvantageEstimator = context.resolve("advantages", config.advantage)
        if self._reward_kl_per_token and not getattr(self.advantages, "takes_token_rewards", False):
            raise ConfigError(
                f"reward_kl.per is 'token', and the advantages {config.advantage.name!r} take no rewards by token. "
                "Set it to 'sequence', or let the estimator read `token_rewards` and say takes_token_rewards = True."
            )
        self._loss_fields: frozenset[str] = frozenset(getattr(self.loss, "required_fields", ()))

    @property
    def models(self) -> Mapping[str, ModelRole]:
        """The reference policy, if loss or reward has a KL to it: the policy as it was before the run."""
        return {"reference": ModelRole(config=self.config.policy)} if "ref_logprobs" in self.required_fields else {}

    @property
    def takes_stale_rollouts(self) -> bool:
        """Whether the loss corrects for rollouts of older weights."""
        return bool(getattr(self.loss, "corrects_importance", False))

    @property
    def required_fields(self) -> frozenset[str]:
        """What loss and reward require; without `logprobs` if each rollout takes one optimizer step."""
        one_update = self.config.updates_per_step * self.config.epochs_per_step == 1
        of_reward = {"ref_logprobs"} if self.config.reward_kl.beta > 0 else frozenset()
        return (self._loss_fields - ({"logprobs"} if one_update else frozenset())) | of_reward

    def keep_group(self, group: RolloutGroup) -> bool:
        """With dynamic sampling: whether the rewards vary, before any shaping. Else every group."""
        if not self.config.dynamic_sampling.enabled:
            return True
        rewards = group.rewards
        return len(rewards) > 1 and max(rewards) > min(rewards)

    def build_batch(self, items: Sequence[RolloutGroup]) -> BatchedDataDict:
        """The sequences of all groups, with shaped rewards; `raw_rewards` [B] keeps those of the environment."""
        from nemo_rl_core.records.to_batch import batch_from_groups

        batch = batch_from_groups(items)
        batch.set_sequences("raw_rewards", batch["rewards"])
        batch.set_sequences("rewards", self._shaped_rewards(batch))
        return batch

    def finish_batch(self, batch: BatchedDataDict) -> Mapping[str, float]:
        """Add `advantages` [N]; take truncated sequences out of `loss_mask` if they are not to be trained."""
        from nemo_rl_plugins_grpo.summary import summarise

        clip, kl_metrics = self.config.advantage_clip, self._take_kl_from_rewards(batch)
        advantages = self.advantages(batch)
        if clip.low is not None or clip.high is not None:
            advantages = advantages.clamp(clip.low, clip.high).masked_fill(~batch["loss_mask"], 0.0)
        batch.set_tokens("advantages", advantages)
        metrics = {**summarise(batch), **kl_metrics}
        if self.config.overlong_filtering:  # after the baselines, in which truncated rollouts count
            kept = ~batch.expand_to_tokens(_truncated(batch))
            batch.set_tokens("loss_mask", batch["loss_mask"] & kept)
            metrics["overlong_filtered_fraction"] = float(_truncated(batch).float().mean()) if len(batch) else 0.0
        return metrics

    def minibatches(self, batch: BatchedDataDict) -> Sequence[Sequence[int]]:
        """Whole groups, in their order, cut into `updates_per_step` steps of nearly equal count, each epoch alike."""
        from nemo_rl_plugins_grpo.minibatches import split_by_groups

        config: GRPOConfig = self.config
        return split_by_groups(batch["group_ids"], config.updates_per_step) * config.epochs_per_step

    @property
    def _reward_kl_per_token(self) -> bool:
        kl = self.config.reward_kl
        return bool(kl.beta > 0 and kl.per == "token")

    def _take_kl_from_rewards(self, batch: BatchedDataDict) -> dict[str, float]:
        """Lower `rewards`, or set `token_rewards`, by the KL to the reference policy; its metrics."""
        if self.config.reward_kl.beta == 0:
            return {}
        from nemo_rl_plugins_grpo.reward_kl import take_kl_from_rewards

        return take_kl_from_rewards(batch, self.config.reward_kl)

    def _shaped_rewards(self, batch: BatchedDataDict) -> Tensor:
        """Return the rewards [B], scaled and shaped as configured."""
        from nemo_rl_plugins_grpo import shaping

        rewards: Tensor = batch["rewards"]
        if self.config.reward_scaling.enabled:
            rewards = shaping.scale_rewards(rewards, self.config.reward_scaling)
        options = self.config.reward_shaping
        if not options.enabled:
            return rewards
        if options.stop_properly_penalty_coef is not None:
            return shaping.truncation_penalty(
                rewards, _truncated(batch), coefficient=options.stop_properly_penalty_coef
            )
        return rewards + shaping.overlong_penalty(
            shaping.response_lengths(batch),
            max_length=self.config.max_response_length,
            buffer_length=self.config.overlong_buffer_length,
            penalty=options.overlong_penalty,
        )


def _with_constant_length(config: GRPOConfig) -> ComponentChoice:
    """The chosen loss; one that divides by a constant length and has none is told the longest response."""
    options = config.loss.options
    if not isinstance(options, PolicyLossConfig) or options.aggregation != "constant" or options.constant_length:
        return config.loss
    return evolve(config.loss, options=evolve(options, constant_length=config.max_response_length))


def _truncated(batch: BatchedDataDict) -> Tensor:
    """[B] bool, whatever the record held it as."""
    import torch

    return torch.as_tensor(batch["truncated"], dtype=torch.bool)
