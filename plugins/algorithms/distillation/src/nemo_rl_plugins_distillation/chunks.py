"""Distributions of chunks: means over the tokens of each.

Legend: N tokens, M trained ones that belong to a chunk, C chunks, K ids, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["NEVER", "Chunks", "likeliest_of_chunks", "mean_of_chunks"]

NEVER = -1e4
"""Stands for log(0): its exponential is 0, and so are products with it."""


@frozen(eq=False)
class Chunks:
    """The trained tokens of a micro-batch by chunk."""

    selected: Tensor
    """[N] bool: the trained tokens that belong to a chunk."""
    of_token: Tensor
    """[M] chunk of each, from 0."""
    sizes: Tensor
    """[C] tokens of each chunk."""

    @staticmethod
    def of(batch: BatchedDataDict) -> Chunks:
        """From `chunk_ids` [N], which count from 0 in each sequence."""
        ids: Tensor = batch["chunk_ids"]
        selected = batch["loss_mask"] & (ids >= 0)
        key = (batch.sequence_index * (batch.num_tokens + 1) + ids)[selected]
        _, of_token, sizes = torch.unique(key, return_inverse=True, return_counts=True)
        return Chunks(selected, of_token, sizes)

    def mean(self, values: Tensor) -> Tensor:
        """[M, ...] to [C, ...], differentiable."""
        return mean_of_chunks(values, self.of_token, self.sizes)


def mean_of_chunks(values: Tensor, of_token: Tensor, sizes: Tensor) -> Tensor:
    """[M, ...] to [C, ...]: the mean over the tokens of each chunk.

    Args:
        values: Of each token.
        of_token: [M] chunk of each.
        sizes: [C] tokens of each chunk.
    """
    total = values.new_zeros(len(sizes), *values.shape[1:]).index_add(0, of_token, values)
    return total / sizes.clamp(min=1).to(values.dtype).view(-1, *(1,) * (values.ndim - 1))


def likeliest_of_chunks(ids: Tensor, probabilities: Tensor, of_token: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The K likeliest tokens of the mean distribution of each chunk.

    Args:
        ids: [M, K] tokens of each position.
        probabilities: [M, K] of them.
        of_token: [M] chunk of each position.
        sizes: [C] positions of each chunk.

    Returns:
        [C, K] ids and [C, K] mean probabilities, likeliest first; 0 where a chunk has fewer.
    """
    num_ids = int(ids.max()) + 1 if ids.numel() else 1
    key = (of_token[:, None] * num_ids + ids).flatten()
    share = (probabilities / sizes[of_token][:, None]).flatten()
    unique, inverse = torch.unique(key, return_inverse=True)
    mass = share.new_zeros(len(unique)).index_add(0, inverse, share)
    order = torch.argsort(mass, descending=True, stable=True)
    order = order[torch.argsort(unique[order] // num_ids, stable=True)]
    chunk = unique[order] // num_ids
    count = torch.bincount(chunk, minlength=len(sizes))
    rank = torch.arange(len(order)) - (count.cumsum(0) - count)[chunk]
    kept = rank < ids.shape[1]
    best = ids.new_zeros(len(sizes), ids.shape[1])
    best_mass = share.new_zeros(len(sizes), ids.shape[1])
    best[chunk[kept], rank[kept]] = (unique[order] % num_ids)[kept]
    best_mass[chunk[kept], rank[kept]] = mass[order][kept]
    return best, best_mass
