"""What happens to rewards before advantages: scaling, and penalties for length and truncation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_rl_plugins_grpo.grouping import group_rollouts

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_plugins_grpo.config import RewardScalingConfig

__all__ = ["overlong_penalty", "response_lengths", "scale_rewards", "truncation_penalty"]


def scale_rewards(rewards: Tensor, config: RewardScalingConfig) -> Tensor:
    """Clamp to [source_min, source_max] and map linearly to [target_min, target_max]; any shape."""
    clamped = rewards.clamp(config.source_min, config.source_max)
    slope = (config.target_max - config.target_min) / (config.source_max - config.source_min)
    return config.target_min + (clamped - config.source_min) * slope


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer_length: int, penalty: float) -> Tensor:
    """What to add to the reward of a response: 0, then down to -penalty over the last `buffer_length` tokens.

    Source: soft overlong punishment of DAPO, arXiv:2503.14476 eq. 13. Departure: it goes on falling past
    `max_length`, which only responses of several turns reach.

    Args:
        lengths: [B] sampled tokens of each response.
        max_length: Where the penalty is reached.
        buffer_length: Over how many tokens it rises.
        penalty: Its size.

    Returns:
        [B] float32, never positive.
    """
    excess = lengths.to(torch.float32) - (max_length - buffer_length)
    return (-excess / buffer_length * penalty).clamp(max=0.0)


def truncation_penalty(rewards: Tensor, truncated: Tensor, *, coefficient: float) -> Tensor:
    """[B] the rewards, those of truncated rollouts multiplied by `coefficient`."""
    return torch.where(truncated, rewards * coefficient, rewards)


def response_lengths(batch: BatchedDataDict) -> Tensor:
    """[B] int64 sampled tokens of the rollout that each sequence belongs to."""
    grouping = group_rollouts(batch)
    per_sequence = batch.sum_per_sequence(batch["loss_mask"].to(torch.int64))
    return grouping.sum_per_rollout(per_sequence)[grouping.rollout_of]
