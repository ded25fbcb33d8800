"""Functions of whole distributions over the vocabulary, a chunk of tokens at a time.

Legend: M tokens, C tokens of a chunk, E hidden size, V vocabulary, F numbers of each token.

What compares every token of a vocabulary with another model's needs [C, V] tensors of both, but only for one chunk at
a time: the forward pass keeps F numbers per token, and the backward pass computes each chunk again with gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from attrs import Factory, evolve, frozen
from torch import Tensor

from nemo_rl_core.models.numerics.autograd import AutogradContext
from nemo_rl_core.models.numerics.logprobs import LogitTransform, transformed_logits
from nemo_rl_core.models.numerics.output_gradients import OutputGradients

__all__ = ["OutputLayer", "VocabularyFunction", "map_vocabulary"]

VocabularyFunction = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""[C, V] float32 logprobs and [C, ...] fields of the batch at the same tokens, to [C, F]; differentiable."""
_SHARE = 4
"""A function holds some [C, V] tensors beside the logits: its chunks are shorter by this."""


@frozen(kw_only=True, eq=False)
class OutputLayer:
    """The last layer of a frozen language model: what makes distributions of its hidden states."""

    weight: Tensor
    """[V, E]"""
    bias: Tensor | None = None
    """[V]"""
    transform: LogitTransform = Factory(LogitTransform)

    @torch.no_grad()
    def logprobs(self, hidden: Tensor) -> Tensor:
        """[C, E] hidden states to [C, V] float32 logprobs, without gradient."""
        logits = transformed_logits(hidden.to(self.weight.dtype), self.weight, self.bias, self.transform)
        return torch.log_softmax(logits, -1)

    def to(self, device: torch.device | str) -> OutputLayer:
        """The layer on a device; itself if it is there."""
        bias = None if self.bias is None else self.bias.to(device)
        return evolve(self, weight=self.weight.to(device), bias=bias)


def map_vocabulary(
    hidden: Tensor,
    weight: Tensor,
    function: VocabularyFunction,
    rows: Mapping[str, Tensor],
    *,
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """`function` of the distributions of all tokens, [M, F] float32, with gradient by hidden states and output layer.

    Args:
        hidden: [M, E] hidden states that predict.
        weight: [V, E] output layer.
        function: Called with chunks, once in the forward pass and once more in the backward pass.
        rows: [M, ...] fields that it gets beside the logprobs; no gradient goes there.
        bias: [V] of the output layer.
        transform: See `LogitTransform`.
        chunk_size: A quarter as many tokens are held at a time.
    """
    out: Tensor = _Map.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, function, dict(rows), transform or LogitTransform(), max(1, chunk_size // _SHARE)
    )
    return out


def _chunk(rows: Mapping[str, Tensor], part: slice) -> dict[str, Tensor]:
    return {name: values[part] for name, values in rows.items()}


class _MapContext(AutogradContext, Protocol):
    saved_tensors: tuple[Tensor, Tensor, Tensor | None]
    function: VocabularyFunction
    rows: dict[str, Tensor]
    transform: LogitTransform
    chunk_size: int


class _Map(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _MapContext,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        function: VocabularyFunction,
        rows: dict[str, Tensor],
        transform: LogitTransform,
        chunk_size: int,
    ) -> Tensor:
        """[M, F] float32 what `function` gives for each token."""
        outputs = []
        for start in range(0, max(len(hidden), 1), chunk_size):  # one empty chunk of no tokens tells F
            part = slice(start, start + chunk_size)
            logits = transformed_logits(hidden[part], weight, bias, transform)
            outputs.append(function(torch.log_softmax(logits, -1), _chunk(rows, part)).float())
        ctx.save_for_backward(hidden, weight, bias)
        ctx.function, ctx.rows, ctx.transform, ctx.chunk_size = function, rows, transform, chunk_size
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx: _MapContext, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden [M, E], weight [V, E] and bias [V], given that of the result [M, F]."""
        hidden, weight, bias = ctx.saved_tensors
        gradients = OutputGradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        for start in range(0, len(hidden), ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            logits = transformed_logits(hidden[part], weight, bias, ctx.transform)
            with torch.enable_grad():
                leaf = logits.detach().requires_grad_()
                values = ctx.function(torch.log_softmax(leaf, -1), _chunk(ctx.rows, part)).float()
                (grad,) = torch.autograd.grad(values, leaf, d_out[part])
            del values, leaf
            gradients.add(part, ctx.transform.backward(grad, logits))
        return *gradients.sums(), *(None,) * 4
