"""Typing of the context of an autograd function, which torch leaves to each function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AutogradContext"]


class AutogradContext(Protocol):
    """First argument of `torch.autograd.Function.forward` and `backward`; each function adds what it keeps."""

    needs_input_grad: tuple[bool, ...]
    """For each argument of the forward pass, whether its gradient is wanted."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors of any shape [...] for the backward pass, which finds them in `saved_tensors`."""
        ...
