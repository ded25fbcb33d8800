"""Cutting a batch of rollouts into minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

__all__ = ["split_rollouts"]


def split_rollouts(num_sequences: int, num_parts: int, *, seed: tuple[int, int] | None) -> list[Sequence[int]]:
    """Sequence indices of each minibatch, sizes within one of each other.

    Args:
        num_sequences: B.
        num_parts: Minibatches wanted; fewer come back when there are fewer sequences.
        seed: Two numbers (of the run, of the pass) that the order follows from; None keeps the order.

    Returns:
        Lists that together hold each index once. One minibatch is never reordered.
    """
    num_parts = min(num_parts, num_sequences)
    order = list(range(num_sequences))
    if seed is not None and num_parts > 1:
        mixed = (seed[0] * 1_000_003 + seed[1]) % 2**63
        order = torch.randperm(num_sequences, generator=torch.Generator().manual_seed(mixed)).tolist()
    bounds = [num_sequences * part // num_parts for part in range(num_parts + 1)] if num_parts else []
    return [order[start:end] for start, end in pairwise(bounds)]
