"""RLOO: a rollout's reward minus the mean of the others of its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from nemo_rl_core.models.numerics.whitening import whiten
from nemo_rl_plugins_grpo.advantage_config import RLOOAdvantagesConfig
from nemo_rl_plugins_grpo.advantages.grpo import group_relative_advantages
from nemo_rl_plugins_grpo.advantages.rewards import require_finite
from nemo_rl_plugins_grpo.grouping import group_rollouts

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["RLOOAdvantages"]


class RLOOAdvantages:
    """Advantages of REINFORCE leave-one-out (arXiv:2402.14740), unbiased; 0 for a lone rollout."""

    config_class: ClassVar[type] = RLOOAdvantagesConfig

    def __init__(self, config: RLOOAdvantagesConfig | None = None) -> None:
        self.config = config or RLOOAdvantagesConfig()

    @property
    def conformance(self) -> Mapping[str, object]:
        """For its kit: whitening compares with the whole batch."""
        return {"baseline": "batch" if self.config.whiten else "group", "counts_forks_once": True}

    def __call__(self, batch: BatchedDataDict) -> Tensor:
        """[N] float32 advantages from `rewards` [B] and `group_ids` [B]; 0 where nothing is trained."""
        grouping = group_rollouts(batch)
        rewards = grouping.per_rollout(batch["rewards"].to(torch.float64))
        advantages = group_relative_advantages(rewards, grouping, normalize=False, leave_one_out=True, epsilon=0.0)
        if self.config.whiten:
            require_finite(batch["rewards"])
            advantages = whiten(advantages, epsilon=self.config.epsilon)
        per_sequence = advantages[grouping.rollout_of].to(torch.float32)
        return batch.expand_to_tokens(per_sequence).masked_fill(~batch["loss_mask"], 0.0)
