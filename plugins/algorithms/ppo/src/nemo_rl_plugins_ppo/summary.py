"""Metrics of one batch: its advantages, and how much of the returns the critic foresaw."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["explained_variance", "summarise"]


def explained_variance(values: Tensor, returns: Tensor) -> float | None:
    """Return 1 - var(returns - values) / var(returns), [N] each; None where the returns do not vary.

    1 is a critic that knows every return, 0 one that says the same everywhere; below 0 it is worse than that.
    """
    if returns.numel() < 2:
        return None
    returns, values = returns.double(), values.double()
    variance = float(returns.var())
    if variance <= 1e-12 * max(float(returns.abs().max()) ** 2, 1e-12):
        return None
    return 1 - float((returns - values).var()) / variance


def summarise(batch: BatchedDataDict) -> dict[str, float]:
    """Of the trained tokens; the critic's values are those from before it saw this batch."""
    mask = batch["loss_mask"]
    if not mask.any():
        return {}
    advantages, values, returns = (batch[name][mask] for name in ("advantages", "values", "returns"))
    metrics = {
        "advantages/mean": float(advantages.mean()),
        "advantages/min": float(advantages.min()),
        "advantages/max": float(advantages.max()),
        "critic/values_min": float(values.min()),
        "critic/values_max": float(values.max()),
    }
    explained = explained_variance(values, returns)
    if explained is not None:
        metrics["critic/explained_variance"] = explained
    return metrics
