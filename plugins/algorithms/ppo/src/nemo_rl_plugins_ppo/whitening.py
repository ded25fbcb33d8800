"""Whitening: a mean of 0 and a variance of 1 over the trained tokens."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["whiten"]

_FLOOR = 1e-8
"""Added to the variance."""
_RELATIVE_NOISE = 1e-12
"""A variance below this share of the squared range is rounding, not variance."""


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(values - mean) / std over the tokens of `mask`, with Bessel's factor.

    Where nothing varies (or there is one token) only the mean is taken off.

    Args:
        values: [N].
        mask: [N] bool.
        shift_mean: False leaves the mean where it was (after the division), as is usual for rewards.

    Returns:
        [N]; 0 outside of `mask`.
    """
    chosen = values[mask]
    if not chosen.numel():
        return torch.zeros_like(values)
    mean = chosen.mean()
    centred = (values - mean).masked_fill(~mask, 0.0)
    variance = centred.square().sum() / max(chosen.numel() - 1, 1)
    if variance > _RELATIVE_NOISE * chosen.abs().max().square():
        scale = (variance + _FLOOR).rsqrt()
    else:
        scale, centred = torch.ones_like(variance), torch.zeros_like(centred)
    whitened = centred * scale if shift_mean else (centred + mean) * scale
    return whitened.masked_fill(~mask, 0.0)
