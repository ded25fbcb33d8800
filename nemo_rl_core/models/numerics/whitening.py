"""Whitening: numbers brought to mean 0 and standard deviation 1."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["whiten"]

_RELATIVE_NOISE = 1e-12
"""A variance below this share of the largest squared value is rounding, not variance."""


def whiten(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    epsilon: float = 0.0,
    variance_floor: float = 0.0,
    shift_mean: bool = True,
) -> Tensor:
    """(values - mean) / (sqrt(variance + variance_floor) + epsilon), the variance with Bessel's factor.

    Where nothing varies (or there is one value) only the mean is taken off.

    Args:
        values: [N].
        mask: [N] bool, True where a value counts; None counts all.
        epsilon: Added to the standard deviation.
        variance_floor: Added to the variance.
        shift_mean: False leaves the mean where it was (after the division), as is usual for rewards.

    Returns:
        [N]; 0 outside of `mask`.
    """
    chosen = values if mask is None else values[mask]
    if not chosen.numel():
        return torch.zeros_like(values)
    whitened = _whiten_all(chosen, epsilon=epsilon, variance_floor=variance_floor, shift_mean=shift_mean)
    return whitened if mask is None else torch.zeros_like(values).masked_scatter(mask, whitened)


def _whiten_all(values: Tensor, *, epsilon: float, variance_floor: float, shift_mean: bool) -> Tensor:
    """`whiten` for values [N] that all count, of which there is at least one."""
    variance, mean = torch.var_mean(values, correction=min(1, values.numel() - 1))
    if variance <= _RELATIVE_NOISE * values.abs().max().square():
        return torch.zeros_like(values) if shift_mean else mean.expand_as(values).clone()
    scale = (variance + variance_floor).sqrt() + epsilon
    return (values - mean if shift_mean else values) / scale
