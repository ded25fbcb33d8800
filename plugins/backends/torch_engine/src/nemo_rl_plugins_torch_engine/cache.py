"""Keys and values of all rows of the batch.

Legend: S rows, K kv heads, T positions, D head size, L layers, N tokens of a packed pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

__all__ = ["KVCache", "LayerShape"]

_FIRST_CAPACITY = 128


@frozen
class LayerShape:
    """Sizes of one layer's keys and values."""

    num_kv_heads: int
    key_size: int
    value_size: int


class KVCache:
    """Per layer, keys [S, K, T, D] and values of one row per sequence.

    Active rows are 0 to n - 1, so that a decoding step attends on views `[:n, :, :t]` without gathering.
    T grows by doubling when a sequence needs it. Memory starts as zeros: masked positions are multiplied
    by zero, which must not meet a nan.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        num_rows: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int | None = None,
    ) -> None:
        self.layers = list(layers)
        self.num_rows = num_rows
        self.max_length = max_length
        self.dtype = dtype
        self.device = device
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.capacity = 0
        self.generation = 0
        """Counts the allocations: what points into the memory of an earlier one is void."""
        self._allocate(min(capacity or _FIRST_CAPACITY, max_length))

    def _allocate(self, capacity: int) -> None:
        old, kept = (self.keys, self.values), self.capacity
        self.keys, self.values = [], []
        for i, shape in enumerate(self.layers):
            for store, grown, size in ((old[0], self.keys, shape.key_size), (old[1], self.values, shape.value_size)):
                tensor = torch.zeros(
                    self.num_rows, shape.num_kv_heads, capacity, size, dtype=self.dtype, device=self.device
                )
                if kept:
                    tensor[:, :, :kept] = store[i]
                grown.append(tensor)
        self.capacity = capacity
        self.generation += 1

    def ensure(self, length: int) -> None:
        """Make room for `length` positions in every row."""
        if length > self.capacity:
            self._allocate(min(max(length, 2 * self.capacity), self.max_length))

    def copy_rows(self, source: Sequence[int], target: Sequence[int], length: int) -> None:
        """Copy the first `length` positions of rows `source` to rows `target` (disjoint from `source`)."""
        src = torch.tensor(source, device=self.device)
        dst = torch.tensor(target, device=self.device)
        for tensor in (*self.keys, *self.values):
            tensor[dst, :, :length] = tensor[src, :, :length]

    def snapshot(self, row: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Return copies of keys and values [H, length, E] of the first `length` positions of a row, per layer."""
        return [(k[row, :, :length].clone(), v[row, :, :length].clone())
                for k, v in zip(self.keys, self.values, strict=True)]  # fmt: skip

    def restore(self, snapshot: Sequence[tuple[Tensor, Tensor]], rows: Sequence[int]) -> None:
        """Write a `snapshot`, keys and values [H, length, E] per layer, to rows."""
        index = torch.tensor(rows, device=self.device)
        for (k, v), keys, values in zip(snapshot, self.keys, self.values, strict=True):
            keys[index, :, : k.shape[1]] = k
            values[index, :, : v.shape[1]] = v

    def clear_row(self, row: int) -> None:
        """Overwrite a row with zeros (after non-finite values, which would reach the row's next user)."""
        for tensor in (*self.keys, *self.values):
            tensor[row].zero_()

    def release(self) -> None:
        """Give the memory back; the cache is empty and small afterwards."""
        self.capacity = 0
        self.keys, self.values = [], []
        self._allocate(min(8, self.max_length))
