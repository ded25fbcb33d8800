"""Linear layers of one input, on the CPU in float32 with a copy of their weights laid out for oneDNN.

With the few rows of a decoding step a product is bound by reading its weight, and BLAS reorders a weight of the
usual layout in every call. Done once after each weight update, a product of 8 to 64 rows costs about two thirds.

Legend: N rows, I input features, O output features of all layers together.
"""

from __future__ import annotations

import logging
from typing import Any, TypeAlias

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import linear

from nemo_rl_core.models.numerics.products import fast_linear

__all__ = ["Linear", "Packing"]

logger = logging.getLogger(__name__)

_MIN_NUMEL = 140_000
"""Of a weight: the call on a smaller one costs more than its layout saves (128 x 1024 loses, 384 x 384 wins)."""
_TOLERANCE = 1e-4
_PROBE_ROWS = 3

_Part: TypeAlias = tuple[Tensor, Tensor | None]


@frozen(eq=False)
class _Copy:
    """All parts of a `Linear` as one weight [O, I], reordered or not, and bias [O]."""

    weight: Tensor
    bias: Tensor | None
    reordered: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product [..., out] of x [..., in] and the weight."""
        if not self.reordered:
            return linear(x, self.weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


class Linear:
    """Linear layers of the same input, side by side.

    Args:
        parts: Weight [O_i, I] and bias [O_i] or None of each layer.
        copy: Their copy, or None to compute with the parts only.
        max_rows: Inputs of more rows are computed with the parts: oneDNN prepares a kernel for every number
            of rows (milliseconds), which pays for the numbers that come again.
    """

    def __init__(self, parts: tuple[_Part, ...], copy: _Copy | None, *, max_rows: int) -> None:
        self._parts = parts
        self._sizes = [weight.shape[0] for weight, _ in parts]
        self._copy = copy
        self._max_rows = max_rows

    def __call__(self, x: Tensor) -> Tensor:
        """[N, O] outputs side by side, of x [N, I]."""
        if self._copy is not None and x.shape[0] <= self._max_rows:
            return self._copy(x)
        outputs = [fast_linear(x, *part) for part in self._parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """[N, O_i] outputs of each layer, perhaps views of one tensor."""
        if self._copy is not None and x.shape[0] <= self._max_rows:
            return self._copy(x).split_with_sizes(self._sizes, dim=-1)
        return tuple(fast_linear(x, *part) for part in self._parts)


class Packing:
    """Makes `Linear`s and decides, once per shape, whether they compute with a copy.

    Args:
        enabled: Copy at all; else, and but on the CPU in float32, every layer reads its own weight.
        max_rows: See `Linear`.
    """

    def __init__(self, *, enabled: bool, max_rows: int) -> None:
        self._enabled = enabled
        self._max_rows = max_rows
        self._reorders: dict[tuple[int, ...], bool] = {}
        self.num_bytes = 0
        """Copied so far."""

    def linear(self, *modules: Any) -> Linear:
        """Join `torch.nn.Linear`s of the same input, with a copy of their weights as they are now."""
        parts = tuple((module.weight, module.bias) for module in modules)
        return Linear(parts, self._copy(parts), max_rows=self._max_rows)

    def _copy(self, parts: tuple[_Part, ...]) -> _Copy | None:
        weight, bias = parts[0]
        if not self._enabled or weight.device.type != "cpu" or weight.dtype != torch.float32:
            return None
        with torch.no_grad():
            if len(parts) > 1:
                weight, bias = torch.cat([w for w, _ in parts]), _join_biases(parts)
            reorder = weight.numel() >= _MIN_NUMEL and self._can_reorder(weight, bias)
            if len(parts) == 1 and not reorder:
                return None
            copied = [weight] if len(parts) == 1 or bias is None else [weight, bias]
            self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in copied)
            return _reordered(weight, bias) if reorder else _Copy(weight, bias, reordered=False)

    def _can_reorder(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Return whether the product with the reordered weight [out, in] exists and is right, tried once per shape."""
        shape = tuple(weight.shape)
        if shape not in self._reorders:
            reason = _try(weight, bias)
            if reason is not None:
                logger.warning("Weights of shape %s stay in their usual layout, which is slower: %s", shape, reason)
            self._reorders[shape] = reason is None
        return self._reorders[shape]


def _reordered(weight: Tensor, bias: Tensor | None) -> _Copy:
    return _Copy(torch.ops.mkldnn._reorder_linear_weight(weight), bias, reordered=True)


def _try(weight: Tensor, bias: Tensor | None) -> str | None:
    """Return what is wrong with the reordered product with a weight [out, in], or None."""
    probe = torch.linspace(-1, 1, _PROBE_ROWS * weight.shape[1]).view(_PROBE_ROWS, -1)
    expected = linear(probe, weight, bias)
    try:
        result = _reordered(weight, bias)(probe)
    except (AttributeError, RuntimeError) as error:  # another build of PyTorch
        return f"{type(error).__name__}: {error}"
    if not torch.allclose(result, expected, rtol=0, atol=_TOLERANCE * float(expected.abs().max())):
        return "its product differs"
    return None


def _join_biases(parts: tuple[_Part, ...]) -> Tensor | None:
    if all(bias is None for _, bias in parts):
        return None
    return torch.cat([w.new_zeros(w.shape[0]) if bias is None else bias for w, bias in parts])
