"""Gradients of an output layer, accumulated over chunks of tokens.

Legend: M tokens, C tokens of a chunk, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_rl_core.models.numerics.products import product

__all__ = ["OutputGradients"]


class OutputGradients:
    """Gradients of hidden states, weight and bias, as far as they are needed; the others are None.

    Args:
        hidden: [M, E] inputs of the layer.
        weight: [V, E]
        bias: [V] or None.
        needed: Whether the gradient of each of the three is needed.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]) -> None:
        """Start with gradients of 0 in the shapes of hidden states [M, E], weight [V, E] and bias [V]."""
        self._inputs = hidden, weight, bias
        self._hidden = torch.empty_like(hidden) if needed[0] else None
        # Chunks add up in float32: a bfloat16 sum over many chunks would lose the small ones.
        self._weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        self._bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None

    def add(self, rows: slice, d_logits: Tensor) -> None:
        """Add a chunk: the tokens `rows`, and [C, V] the gradient of what the layer gave for them."""
        hidden, weight, _ = self._inputs
        if self._bias is not None:
            self._bias += d_logits.sum(0)
        d_logits = d_logits.to(hidden.dtype)
        if self._hidden is not None:
            self._hidden[rows] = product(d_logits, weight.T)
        if self._weight is not None:
            _add_outer(self._weight, d_logits, hidden[rows])

    def sums(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """[M, E], [V, E] and [V]: the three, in the types of what they belong to."""
        _, weight, bias = self._inputs
        return (
            self._hidden,
            None if self._weight is None else self._weight.to(weight.dtype),
            None if self._bias is None or bias is None else self._bias.to(bias.dtype),
        )


def _add_outer(total: Tensor, grad: Tensor, chunk: Tensor) -> None:
    """`total += grad.T @ chunk`, [V, E]."""
    if grad.dtype == total.dtype:
        total.addmm_(grad.T, chunk)
    else:
        total += grad.T @ chunk
