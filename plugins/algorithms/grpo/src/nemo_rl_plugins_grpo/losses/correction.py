"""Importance weights for the mismatch between the policy in the trainer and in the engine.

Kernels, precisions and weight versions differ, so a token was sampled with a probability slightly (or,
for stale rollouts, clearly) other than the trainer gives it. Weight: exp(trainer - engine logprob).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_rl_core.errors import ConfigError

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["correct", "importance_weights"]


def importance_weights(log_ratio: Tensor) -> Tensor:
    """[N] the exponential of trainer - engine logprob; 0 where that is not a finite number."""
    return log_ratio.exp().nan_to_num(nan=0.0, posinf=0.0)


def correct(
    log_ratio: Tensor,
    batch: BatchedDataDict,
    *,
    kind: str,
    low: float | None,
    high: float | None,
) -> Tensor | None:
    """The factor on each token's policy-gradient term, without gradient.

    Args:
        log_ratio: [N] trainer - engine logprob, 0 where masked.
        batch: Read for `loss_mask` [N] and the extent of the sequences.
        kind: "none"; "importance": the weights as they are; "tis": clamped to the bounds (truncated
            importance sampling, F. Yao et al. 2025); "icepop": 0 outside the bounds; "seq_mask_tis":
            0 for sequences whose geometric mean weight is outside the bounds.
        low: Lower bound; None is 0.
        high: Upper bound; None is none.

    Returns:
        [N], or None for no correction.
    """
    if kind == "none":
        return None
    weights = importance_weights(log_ratio)
    if kind == "importance":
        return weights
    low, high = low or 0.0, torch.inf if high is None else high
    if kind == "tis":
        return weights.clamp(low, high)
    if kind == "icepop":
        return weights.masked_fill((weights < low) | (weights > high), 0.0)
    if kind == "seq_mask_tis":
        mask = batch["loss_mask"]
        count = batch.sum_per_sequence(mask.to(log_ratio.dtype)).clamp(min=1)
        mean = (batch.sum_per_sequence(log_ratio) / count).exp()
        kept = (mean >= low) & (mean <= high)  # nan is outside
        return weights * batch.expand_to_tokens(kept)
    raise ConfigError(f"correction {kind!r} is not known")
