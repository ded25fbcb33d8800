"""Rewards as estimators read them: finite, and summed over what follows a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_rl_core.errors import DataError

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["require_finite", "returns"]


def require_finite(rewards: Tensor, name: str = "rewards") -> None:
    """Refuse rewards [B] that would spoil every rollout of the batch.

    Raises:
        DataError: One of them is nan or inf.
    """
    bad = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
    if bad:
        raise DataError(
            f"`{name}` of sequence {bad[0]} is {float(rewards[bad[0]])} ({len(bad)} such in the batch), and these "
            "advantages compare every rollout with the whole batch. Return finite rewards."
        )


def returns(batch: BatchedDataDict, rewards: Tensor) -> Tensor:
    """[N] float64 what follows each token, itself included: the sequence's reward and its later rewards by token.

    Args:
        batch: `loss_mask` [N]; if present `token_rewards` [N], which is read at trained tokens.
        rewards: [B] float64, had at the end of each sequence.
    """
    at_tokens = batch.expand_to_tokens(rewards)
    if "token_rewards" not in batch:
        return at_tokens
    by_token: Tensor = batch["token_rewards"].detach().to(torch.float64).masked_fill(~batch["loss_mask"], 0.0)
    before = by_token.cumsum(0) - by_token
    until = by_token.cumsum(0)[batch.offsets[1:] - 1] if len(batch) else by_token
    following: Tensor = at_tokens + batch.expand_to_tokens(until) - before
    return following
