"""Metrics of one batch's rewards and advantages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_rl_plugins_grpo.grouping import group_rollouts

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["summarise"]


def summarise(batch: BatchedDataDict) -> dict[str, float]:
    """Spread of the advantages over trained tokens, and the share of groups that carry no signal.

    `shaped_reward` is the mean over rollouts of the reward that the advantages were made from, and
    `zero_variance_groups` the share of groups in which it does not vary.
    """
    advantages = batch["advantages"][batch["loss_mask"]]
    grouping = group_rollouts(batch)
    if not len(batch) or not advantages.numel():
        return {"advantages/mean": 0.0, "advantages/min": 0.0, "advantages/max": 0.0, "zero_variance_groups": 1.0}
    rewards = grouping.per_rollout(batch["rewards"])
    flat = grouping.range_per_group(rewards) == 0
    return {
        "advantages/mean": float(advantages.mean()),
        "advantages/min": float(advantages.min()),
        "advantages/max": float(advantages.max()),
        "shaped_reward": float(rewards.mean()),
        "zero_variance_groups": float(flat.float().mean()),
    }
