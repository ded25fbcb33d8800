"""Matrix products in float32 on a CPU, by oneDNN.

PyTorch computes them with its BLAS (MKL in the usual builds), which leaves half of the vector width of some processors
unused. oneDNN's kernels are made at run time for the processor they run on: 460 against 190 GFLOP/s on two Zen 5 cores,
about even where the BLAS is at its best. Both sum in float32, in an order of their own.

Legend: N rows, I input features, O output features.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_rl_core.models.numerics.autograd import AutogradContext

__all__ = ["fast_linear", "product", "use_fast_linear"]

logger = logging.getLogger(__name__)

_MIN_WORK = 2**26
"""Multiplications of a product. oneDNN makes a kernel for every shape, numbers of rows among them, which takes about a
millisecond; a smaller product does not win it back, since micro-batches differ in their number of tokens."""
_TOLERANCE = 1e-4
_PLAIN = (Tensor, nn.Parameter)


def product(x: Tensor, y: Tensor) -> Tensor:
    """`x @ y.T` of [N, I] and [O, I], without gradient; transposed views are read as they are."""
    if _pays(x, y):
        return _multiply(x, y, None)
    return x @ y.T


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, with gradient: by oneDNN where that is possible and pays.

    Args:
        x: [..., I].
        weight: [O, I].
        bias: [O] or None.

    Returns:
        [..., O].
    """
    rows = x.reshape(-1, x.shape[-1])
    if not _pays(rows, weight):
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], -1)


def use_fast_linear(model: nn.Module) -> int:
    """Let every plain `torch.nn.Linear` of a model compute by `fast_linear`; the number of them.

    The modules, their parameters and their names stay. Those of a derived class keep their own forward.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.__class__ = _FastLinear
    return len(layers)


class _FastLinear(nn.Linear):
    """A linear layer that computes by `fast_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return fast_linear(x, self.weight, self.bias)


class _LinearContext(AutogradContext, Protocol):
    saved_tensors: tuple[Tensor, Tensor]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _LinearContext, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[N, O], given `x` [N, I], `weight` [O, I] and `bias` [O]."""
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: _LinearContext, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of `x` [N, I], `weight` [O, I] and `bias` [O], given that of the result [N, O]."""
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        return (
            product(grad, weight.T) if need_x else None,
            product(grad.T, x.T) if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


def _multiply(x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, y, bias, "none", [], "")
    return out


def _pays(x: Tensor, y: Tensor) -> bool:
    """Whether `x @ y.T` of [N, I] and [O, I] is for oneDNN, and large enough to be worth a kernel of its own."""
    return (
        x.shape[0] * y.numel() >= _MIN_WORK
        and x.dtype == y.dtype == torch.float32
        and x.device.type == y.device.type == "cpu"
        and type(x) in _PLAIN
        and type(y) in _PLAIN
        and _is_dense(x)
        and _is_dense(y)
        and _works()
    )


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.T.is_contiguous()


@cache
def _works() -> bool:
    """Whether this build of PyTorch has the product and it is right for rows and columns, tried once."""
    x, y = torch.linspace(-1, 1, 7 * 48).view(7, 48), torch.linspace(1, -2, 32 * 48).view(32, 48)
    expected = x.double() @ y.double().T
    try:
        results = [
            _multiply(x, y, None),
            _multiply(x.T.contiguous().T, y, None),
            _multiply(x, y.T.contiguous().T, None),
        ]
    except (AttributeError, RuntimeError) as error:  # another build of PyTorch
        logger.info("Products by oneDNN are not available here (%s: %s).", type(error).__name__, error)
        return False
    return all(torch.allclose(one.double(), expected, rtol=0, atol=_TOLERANCE) for one in results)
