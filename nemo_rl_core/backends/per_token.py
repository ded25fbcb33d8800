"""Per-token results of micro-batches, put back in the order of their batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["PerToken", "fill_in_order", "one_token"]


class PerToken:
    """Collects what a model gives for each token of a batch, micro-batch by micro-batch.

    Args:
        batch: The whole batch of N tokens.
    """

    def __init__(self, batch: BatchedDataDict) -> None:
        self._batch = batch
        self._starts = batch.offsets[:-1]
        self.values: dict[str, Tensor] = {}
        """[N, ...] on the CPU by name; 0 where nothing was put."""

    def put(self, indices: Sequence[int], found: Mapping[str, Tensor]) -> None:
        """Add the results of some sequences.

        Args:
            indices: The sequences, in the order of their results; if there are none, only the names count.
            found: Results [n, ...] by name, for the n tokens of these sequences.
        """
        selected = self._batch.select(indices)
        starts = self._starts[torch.as_tensor(indices, dtype=torch.int64)]
        places = selected.position_ids + selected.expand_to_tokens(starts)
        for name, values in found.items():
            part = values.detach().cpu()
            whole = self.values.setdefault(name, part.new_zeros(self._batch.num_tokens, *part.shape[1:]))
            if len(indices):
                whole[places] = part


def fill_in_order(lengths: Tensor, budget: int) -> list[list[int]]:
    """Group the sequences in order, as many at a time as `budget` tokens allow, but at least one.

    `lengths` [B] counts their tokens. No sequences give one empty list.
    """
    parts: list[list[int]] = []
    used = budget
    for i, length in enumerate(lengths.tolist()):
        if used + length > budget or not parts:
            parts.append([])
            used = 0
        parts[-1].append(i)
        used += length
    return parts or [[]]


def one_token() -> BatchedDataDict:
    """The smallest batch a model can be run on, for a rank whose micro-batch is empty."""
    ids = torch.zeros(1, dtype=torch.int64)
    return BatchedDataDict([1], {"input_ids": ids, "loss_mask": torch.zeros(1, dtype=torch.bool)})
