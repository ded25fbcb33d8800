"""REINFORCE++: returns of each token, whitened over the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from nemo_rl_core.models.numerics.whitening import whiten
from nemo_rl_plugins_grpo.advantage_config import ReinforcePPAdvantagesConfig
from nemo_rl_plugins_grpo.advantages.rewards import require_finite, returns
from nemo_rl_plugins_grpo.grouping import group_rollouts

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["ReinforcePPAdvantages"]


class ReinforcePPAdvantages:
    """Advantages of REINFORCE++ (arXiv:2501.03262), with and without the mean of the group as baseline.

    A token's return is the reward of its response and the `token_rewards` (such as a KL) of this and later tokens,
    not discounted. The mean and deviation for whitening are those of trained tokens, of which a long response has
    more.
    """

    config_class: ClassVar[type] = ReinforcePPAdvantagesConfig
    takes_token_rewards: ClassVar[bool] = True

    def __init__(self, config: ReinforcePPAdvantagesConfig | None = None) -> None:
        self.config = config or ReinforcePPAdvantagesConfig()

    @property
    def conformance(self) -> Mapping[str, object]:
        """For its kit: whitening compares with the whole batch."""
        alone = "group" if self.config.group_baseline else "none"
        return {"baseline": "batch" if self.config.whiten else alone}

    def __call__(self, batch: BatchedDataDict) -> Tensor:
        """[N] float32 advantages from `rewards` [B] and, if present, `token_rewards` [N]; 0 where nothing is trained.

        Raises:
            DataError: A reward is not finite, and all are compared with it.
        """
        rewards = batch["rewards"].to(torch.float64)
        if self.config.whiten:
            require_finite(rewards)
        if self.config.group_baseline:
            rewards = _centred(batch, rewards)
        advantages = returns(batch, rewards)
        mask = batch["loss_mask"]
        if self.config.whiten:
            advantages = whiten(advantages, mask, epsilon=self.config.epsilon)
        return advantages.to(torch.float32).masked_fill(~mask, 0.0)


def _centred(batch: BatchedDataDict, rewards: Tensor) -> Tensor:
    """[B] minus the mean over the rollouts of the group; exactly 0 where they do not vary."""
    grouping = group_rollouts(batch)
    per_rollout = grouping.per_rollout(rewards)
    mean = grouping.sum_per_group(per_rollout) / grouping.sum_per_group(torch.ones_like(per_rollout))
    flat = grouping.range_per_group(per_rollout)[grouping.group_of] == 0
    centred = (per_rollout - mean[grouping.group_of]).masked_fill(flat, 0.0)
    return centred[grouping.rollout_of]
