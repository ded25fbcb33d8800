"""A KL to the reference policy, taken from the rewards before the advantages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_rl_core.models.numerics.kl import kl_estimate
from nemo_rl_plugins_grpo.grouping import group_rollouts

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_plugins_grpo.config import RewardKLConfig

__all__ = ["take_kl_from_rewards"]


def take_kl_from_rewards(batch: BatchedDataDict, config: RewardKLConfig) -> dict[str, float]:
    """Lower what rollouts are worth by beta times their KL to the reference policy.

    The KL is of the policy that sampled (`logprobs`, before the step's updates, if in the batch, else
    `rollout_logprobs`), so that the score function of the policy gradient gives its gradient. It changes `rewards`
    [B] (all sequences of a rollout together, also forked ones), or sets `token_rewards` [N].

    Args:
        batch: `ref_logprobs` [N] and the above; changed in place.
        config: How.

    Returns:
        `reward_kl`, the mean of the estimator over trained tokens, and `reward_kl_penalty`, the mean over sequences
        of what was taken.
    """
    mask = batch["loss_mask"]
    policy = batch["logprobs"] if "logprobs" in batch else batch["rollout_logprobs"]
    log_ratio = (batch["ref_logprobs"] - policy).masked_fill(~mask, 0.0)
    kl = kl_estimate(log_ratio.detach(), config.type, bound=config.clamp)
    penalty = config.beta * batch.sum_per_sequence(kl)
    if config.per == "token":
        batch.set_tokens("token_rewards", -config.beta * kl)
    else:
        grouping = group_rollouts(batch)
        of_rollout = grouping.sum_per_rollout(penalty)[grouping.rollout_of]
        batch.set_sequences("rewards", batch["rewards"] - of_rollout)
    trained = max(int(mask.sum()), 1)
    return {"reward_kl": float(kl.sum()) / trained, "reward_kl_penalty": float(penalty.sum()) / max(len(batch), 1)}
