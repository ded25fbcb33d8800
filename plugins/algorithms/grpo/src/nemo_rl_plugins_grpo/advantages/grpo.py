"""Group-relative advantages: a rollout against the others of its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from nemo_rl_plugins_grpo.advantage_config import GroupRelativeConfig
from nemo_rl_plugins_grpo.grouping import Grouping, group_rollouts

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["GroupRelativeAdvantages", "group_relative_advantages"]

_RELATIVE_NOISE = 1e-12
"""A variance below this share of the group's squared range is rounding, not variance."""


class GroupRelativeAdvantages:
    """Advantages of GRPO (arXiv:2402.03300), with the leave-one-out baseline of RLOO (arXiv:2402.14740)."""

    config_class: ClassVar[type] = GroupRelativeConfig
    conformance: ClassVar[Mapping[str, object]] = {"counts_forks_once": True}

    def __init__(self, config: GroupRelativeConfig | None = None) -> None:
        self.config = config or GroupRelativeConfig()

    def __call__(self, batch: BatchedDataDict) -> Tensor:
        """[N] float32 advantages from `rewards` [B] and `group_ids` [B]; 0 where nothing is trained."""
        grouping = group_rollouts(batch)
        rewards = grouping.per_rollout(batch["rewards"].to(torch.float64))
        per_rollout = group_relative_advantages(
            rewards,
            grouping,
            normalize=self.config.normalize,
            leave_one_out=self.config.leave_one_out,
            epsilon=self.config.epsilon,
        )
        per_sequence = per_rollout[grouping.rollout_of].to(torch.float32)
        return batch.expand_to_tokens(per_sequence).masked_fill(~batch["loss_mask"], 0.0)


def group_relative_advantages(
    rewards: Tensor, grouping: Grouping, *, normalize: bool, leave_one_out: bool, epsilon: float
) -> Tensor:
    """(reward - baseline) / (std + epsilon), each over the group or over the group's other rollouts.

    The standard deviation has Bessel's factor. Where it is zero (or the subset has one member, as with
    leave-one-out in a group of two) the difference is not divided. A group of one, and a group whose
    rewards are all equal, have no signal: exactly 0.

    Args:
        rewards: [R] float64, one of each rollout.
        grouping: Of the rollouts.
        normalize: Divide by the standard deviation.
        leave_one_out: Leave the rollout itself out of its baseline and its deviation.
        epsilon: Added to the standard deviation.

    Returns:
        [R] float64.
    """
    group_of = grouping.group_of
    size = grouping.sum_per_group(torch.ones_like(rewards))
    mean = grouping.sum_per_group(rewards) / size
    spread = grouping.range_per_group(rewards)[group_of]
    centred = rewards - mean[group_of]
    squares = grouping.sum_per_group(centred.square())[group_of]
    count = size[group_of]
    if leave_one_out:
        # The centred rewards of a group sum to zero, so those of the others sum to minus one's own.
        count = count - 1
        baseline = -centred / count.clamp(min=1)
        squares = squares - centred.square() - count * baseline.square()
    else:
        baseline = torch.zeros_like(centred)
    advantages = centred - baseline
    if normalize:
        variance = squares / (count - 1).clamp(min=1)
        varies = (count > 1) & (variance > _RELATIVE_NOISE * spread.square())
        std = variance.clamp(min=0).sqrt()
        advantages = torch.where(varies, advantages / (std + epsilon), advantages)
    return advantages.masked_fill(spread == 0, 0.0)
