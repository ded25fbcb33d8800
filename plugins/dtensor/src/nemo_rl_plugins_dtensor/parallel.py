"""Ranks of one model: none but this, or a mesh of data-parallel by tensor-parallel processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["OneProcess"]


class OneProcess:
    """The whole model on one device; also what `Mesh` does for many, in the simplest form."""

    dp_index = 0
    dp_size = 1
    is_first = True
    shards_weights = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def expect_reduction(self, *, last: bool) -> None:
        """Say whether gradients are reduced in the next backward pass."""

    def squared_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """[] float32 squared L2 norm over all ranks."""
        if not gradients:
            return torch.zeros((), device=self.device)
        norms = torch._foreach_norm(list(gradients), 2, dtype=torch.float32)  # type: ignore[attr-defined]
        return torch.stack(list(norms)).square().sum()

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Sum over data-parallel ranks."""
        return value

    def full(self, tensor: Tensor) -> Tensor:
        """The whole tensor of a parameter; every rank calls it."""
        return tensor.detach()

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self) -> None:
        """Leave the group."""

    def local_state(self, state: Any) -> Any:
        """What this rank writes of a state dictionary."""
        return state
