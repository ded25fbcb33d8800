"""The importance ratio of the current policy, by token or by sequence, and its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_rl_core.protocols.loss import Metric
from nemo_rl_plugins_grpo.losses.tokens import Tokens, mean_over_tokens

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_plugins_grpo.loss_config import RatioLossConfig

__all__ = ["log_ratio", "per_sequence", "ratio_metrics", "ratio_of"]

_MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8: beyond it a ratio is held, so that inf * 0 cannot make nan."""


def log_ratio(tokens: Tokens, config: RatioLossConfig) -> Tensor:
    """[N] current - old logprob, old being what `config` names; 0 where masked."""
    against = tokens.start_logprobs
    if config.ratio_against == "rollout":
        against = tokens.rollout_logprobs
    if config.force_on_policy_ratio:
        against = tokens.logprobs.detach()
    return tokens.logprobs - against


def ratio_of(log_ratio: Tensor) -> Tensor:
    """[N] to [N]: the exponential, held below exp(20)."""
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def per_sequence(values: Tensor, mask: Tensor, batch: BatchedDataDict, *, mean: bool) -> Tensor:
    """[N] at each token the sum (or mean) of `values` over the trained tokens of its sequence."""
    total = batch.sum_per_sequence(values.masked_fill(~mask, 0.0))
    if mean:
        total = total / batch.sum_per_sequence(mask.to(values.dtype)).clamp(min=1)
    return batch.expand_to_tokens(total)


def ratio_metrics(ratio: Tensor, clipped_low: Tensor, clipped_high: Tensor, tokens: Tokens) -> dict[str, Metric]:
    """`probs_ratio` with its extremes, and the shares of tokens that the bounds acted on.

    Args:
        ratio: [N], without gradient.
        clipped_low: [N] bool, held up by the lower bound.
        clipped_high: [N] bool, held down by the upper bound.
        tokens: For the mask.
    """
    mask = tokens.mask
    metrics = {
        "probs_ratio": mean_over_tokens(ratio, mask),
        "clip_fraction_low": mean_over_tokens(clipped_low.to(ratio.dtype), mask),
        "clip_fraction_high": mean_over_tokens(clipped_high.to(ratio.dtype), mask),
        "clip_fraction": mean_over_tokens((clipped_low | clipped_high).to(ratio.dtype), mask),
    }
    if ratio.numel():
        # inf and -inf are the neutral elements: a micro-batch without trained tokens moves neither.
        metrics["probs_ratio_min"] = Metric(ratio.masked_fill(~mask, torch.inf).amin(), reduction="min")
        metrics["probs_ratio_max"] = Metric(ratio.masked_fill(~mask, -torch.inf).amax(), reduction="max")
    return metrics
