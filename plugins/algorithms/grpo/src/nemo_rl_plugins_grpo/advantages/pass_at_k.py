"""Advantages for the best of k rollouts: pass@k for rewards of 0 and 1, max@k for others."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import comb
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from nemo_rl_plugins_grpo.advantage_config import PassAtKConfig
from nemo_rl_plugins_grpo.grouping import group_rollouts

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["PassAtKAdvantages", "best_of_k_advantages"]


class PassAtKAdvantages:
    """How much better the best of k is with a rollout among them than without it.

    Source: the leave-one-out form of PKPO, arXiv:2505.15201 section 4 (see also arXiv:2503.19595), whose expectation
    is the gradient of max@k up to the constant k / n, left out here. All subsets of the group are averaged exactly.
    """

    config_class: ClassVar[type] = PassAtKConfig

    def __init__(self, config: PassAtKConfig | None = None) -> None:
        self.config = config or PassAtKConfig()

    @property
    def conformance(self) -> Mapping[str, object]:
        """For its kit: rollouts that are never the best of k have one advantage, unless k is 1."""
        return {"strict": self.config.k == 1, "counts_forks_once": True}

    def __call__(self, batch: BatchedDataDict) -> Tensor:
        """[N] float32 advantages from `rewards` [B] and `group_ids` [B]; 0 where nothing is trained."""
        grouping = group_rollouts(batch)
        rewards = grouping.per_rollout(batch["rewards"].to(torch.float64))
        advantages = torch.zeros_like(rewards)
        for group in range(grouping.num_groups):
            members = grouping.group_of == group
            advantages[members] = best_of_k_advantages(rewards[members], self.config.k)
        per_sequence = advantages[grouping.rollout_of].to(torch.float32)
        return batch.expand_to_tokens(per_sequence).masked_fill(~batch["loss_mask"], 0.0)


def best_of_k_advantages(rewards: Tensor, k: int) -> Tensor:
    """Mean of the maximum over the k-subsets with a rollout, minus that over those without it.

    Args:
        rewards: [n] float64, of one group.
        k: Size of the subsets; n - 1 if the group is too small for it.

    Returns:
        [n] float64; 0 for a group of one and where no reward differs.
    """
    n = rewards.numel()
    if n < 2 or rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    ordered, order = rewards.sort()
    own, pair, below, above = _weights(n, min(k, n - 1)).to(rewards)
    with_it = own * ordered + _sum_after(pair * ordered)
    without = (below * ordered).cumsum(0) - below * ordered + _sum_after(above * ordered)
    return torch.zeros_like(rewards).scatter(0, order, with_it - without)


def _sum_after(values: Tensor) -> Tensor:
    """[n] the sum of what stands behind each place."""
    return values.flip(0).cumsum(0).flip(0) - values


@cache
def _weights(n: int, k: int) -> Tensor:
    """[4, n] float64 share of the k-subsets whose maximum stands at place j of the ascending order.

    Of those with a given member: j itself; another one below j. Of those without it: it stands above j; below j.
    """
    having, lacking = comb(n - 1, k - 1), comb(n - 1, k)
    rows = [
        [comb(j, k - 1) / having for j in range(n)],
        [comb(j - 1, k - 2) / having if j and k > 1 else 0.0 for j in range(n)],
        [comb(j, k - 1) / lacking for j in range(n)],
        [comb(j - 1, k - 1) / lacking if j else 0.0 for j in range(n)],
    ]
    return torch.tensor(rows, dtype=torch.float64)
