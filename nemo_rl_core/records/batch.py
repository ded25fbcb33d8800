"""Ragged batches as flat token streams: no padding inside.

Legend: B sequences, N tokens in all (the sum of the lengths), T the longest length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_rl_core.errors import ShapeMismatch

__all__ = ["BatchedDataDict"]


class BatchedDataDict:
    """`B` sequences of unequal length, held as flat streams.

    Per-token fields are tensors `[N, ...]`, the sequences one after another; per-sequence fields are
    tensors `[B, ...]` or, for what is not numeric, lists of length `B`. Field names of the framework:
    `input_ids, loss_mask, rollout_logprobs, logprobs, ref_logprobs, advantages` per token and
    `rewards, group_ids, weight_version` per sequence.

    The value of a per-token field at position i belongs to token i: `logprobs[i]` is the log
    probability of `input_ids[i]` given the tokens before it in its own sequence, and 0 for the first
    token of each sequence (which nothing predicts and whose `loss_mask` must be False).

    A batch is cheap to reorder, split and merge: those are index arithmetic on the streams.

    Args:
        lengths: [B] int64, tokens in each sequence, each >= 1.
        tokens: Per-token fields.
        sequences: Per-sequence fields.

    Raises:
        ShapeMismatch: A field's first dimension is neither N nor B as its place demands.
    """

    def __init__(
        self,
        lengths: Tensor | Sequence[int],
        tokens: Mapping[str, Tensor] | None = None,
        sequences: Mapping[str, Any] | None = None,
    ) -> None:
        """Make a batch of sequences of `lengths` [B]; its fields are `tokens` [N, ...] and `sequences` [B, ...]."""
        self.lengths: Tensor = torch.as_tensor(lengths, dtype=torch.int64)
        self.tokens: dict[str, Tensor] = {}
        self.sequences: dict[str, Any] = {}
        self.num_tokens: int = int(self.lengths.sum()) if self.lengths.numel() else 0
        for name, value in (tokens or {}).items():
            self.set_tokens(name, value)
        for name, value in (sequences or {}).items():
            self.set_sequences(name, value)

    # -- reading ------------------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of sequences, B."""
        return int(self.lengths.numel())

    def __getitem__(self, name: str) -> Any:
        """The field `name`, per-token or per-sequence."""
        if name in self.tokens:
            return self.tokens[name]
        if name in self.sequences:
            return self.sequences[name]
        raise KeyError(f"The batch has no field {name!r}. It has: {sorted(self.field_names)}.")

    def __contains__(self, name: object) -> bool:
        """Whether the batch has a field of this name."""
        return name in self.tokens or name in self.sequences

    def __repr__(self) -> str:
        """Sizes and field names, not contents."""
        return (
            f"BatchedDataDict(B={len(self)}, N={self.num_tokens}, tokens={sorted(self.tokens)}, "
            f"sequences={sorted(self.sequences)})"
        )

    @property
    def field_names(self) -> frozenset[str]:
        """Names of all fields."""
        return frozenset(self.tokens) | frozenset(self.sequences)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence; 0 for an empty batch."""
        return int(self.lengths.max()) if len(self) else 0

    @property
    def offsets(self) -> Tensor:
        """[B + 1] int64: sequence i is `stream[offsets[i]:offsets[i + 1]]` (cumulative lengths)."""
        zero = torch.zeros(1, dtype=torch.int64, device=self.lengths.device)
        return torch.cat([zero, self.lengths.cumsum(0)])

    @property
    def sequence_index(self) -> Tensor:
        """[N] int64: which sequence each token belongs to."""
        index = torch.arange(len(self), device=self.lengths.device)
        return torch.repeat_interleave(index, self.lengths, output_size=self.num_tokens)

    @property
    def position_ids(self) -> Tensor:
        """[N] int64: each token's position in its own sequence, from 0."""
        starts = self.offsets[:-1].repeat_interleave(self.lengths, output_size=self.num_tokens)
        return torch.arange(self.num_tokens, device=self.lengths.device) - starts

    def unpack(self, name: str) -> list[Tensor]:
        """A per-token field as B views [length, ...], one per sequence."""
        return list(torch.split(self.tokens[name], self.lengths.tolist()))

    def padded(self, name: str, *, pad_value: float = 0, side: str = "right") -> Tensor:
        """A per-token field with padding, [B, T, ...], for a model that needs it."""
        flat = self.tokens[name]
        width = self.max_length
        out = flat.new_full((len(self), width, *flat.shape[1:]), pad_value)
        column = self.position_ids
        if side == "left":
            column = column + (width - self.lengths).repeat_interleave(self.lengths, output_size=self.num_tokens)
        out[self.sequence_index, column] = flat
        return out

    # -- writing ------------------------------------------------------------------------------

    def set_tokens(self, name: str, value: Tensor) -> None:
        """Set a per-token field, [N, ...]."""
        if value.shape[:1] != (self.num_tokens,):
            raise ShapeMismatch(
                f"Per-token field {name!r} has shape {list(value.shape)}; the batch holds "
                f"N={self.num_tokens} tokens in B={len(self)} sequences, so its first dimension must be "
                f"{self.num_tokens}. Expand a per-sequence value with expand_to_tokens()."
            )
        self.tokens[name] = value

    def set_sequences(self, name: str, value: Tensor | Sequence[Any]) -> None:
        """Set a per-sequence field: a tensor [B, ...] or a list of length B."""
        if len(value) != len(self):
            raise ShapeMismatch(
                f"Per-sequence field {name!r} has {len(value)} entries; the batch has B={len(self)} sequences."
            )
        self.sequences[name] = value

    def expand_to_tokens(self, per_sequence: Tensor) -> Tensor:
        """[B, ...] to [N, ...]: each sequence's value at each of its tokens."""
        return per_sequence.repeat_interleave(self.lengths, dim=0, output_size=self.num_tokens)

    def sum_per_sequence(self, per_token: Tensor) -> Tensor:
        """[N] to [B]: the sum of a per-token value over each sequence, differentiable."""
        out = per_token.new_zeros(len(self))
        return out.index_add(0, self.sequence_index, per_token)

    # -- index arithmetic -----------------------------------------------------------------------

    def select(self, indices: Tensor | Sequence[int]) -> BatchedDataDict:
        """The sequences of these `indices` [n], in that order (repeats allowed)."""
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.lengths.device)
        lengths = self.lengths[index]
        total = int(lengths.sum()) if lengths.numel() else 0
        starts = self.offsets[:-1][index]
        new_starts = lengths.cumsum(0) - lengths
        positions = torch.arange(total, device=lengths.device)
        positions = positions + (starts - new_starts).repeat_interleave(lengths, output_size=total)
        rows = index.tolist()
        return BatchedDataDict(
            lengths,
            {name: value[positions] for name, value in self.tokens.items()},
            {
                name: value[index] if isinstance(value, Tensor) else [value[i] for i in rows]
                for name, value in self.sequences.items()
            },
        )

    def split(self, sizes: Sequence[int]) -> Iterator[BatchedDataDict]:
        """Consecutive batches of `sizes` sequences each."""
        start = 0
        for size in sizes:
            yield self.select(range(start, start + size))
            start += size

    def repeat_interleave(self, repeats: int) -> BatchedDataDict:
        """Each sequence `repeats` times in a row."""
        return self.select(torch.arange(len(self)).repeat_interleave(repeats))

    @staticmethod
    def concat(batches: Sequence[BatchedDataDict]) -> BatchedDataDict:
        """One batch of all sequences, in order. Every batch must have the same fields."""
        if not batches:
            return BatchedDataDict(torch.zeros(0, dtype=torch.int64))
        names = batches[0].field_names
        for other in batches[1:]:
            if other.field_names != names:
                raise ShapeMismatch(
                    f"Batches with different fields cannot be joined: {sorted(names ^ other.field_names)} "
                    "are in one and not in another."
                )
        first = batches[0]
        return BatchedDataDict(
            torch.cat([b.lengths for b in batches]),
            {name: torch.cat([b.tokens[name] for b in batches]) for name in first.tokens},
            {
                name: torch.cat([b.sequences[name] for b in batches])
                if isinstance(value, Tensor)
                else [x for b in batches for x in b.sequences[name]]
                for name, value in first.sequences.items()
            },
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> BatchedDataDict:
        """The same batch with every tensor on `device`."""
        moved = BatchedDataDict.__new__(BatchedDataDict)
        moved.lengths = self.lengths.to(device, non_blocking=non_blocking)
        moved.num_tokens = self.num_tokens
        moved.tokens = {name: value.to(device, non_blocking=non_blocking) for name, value in self.tokens.items()}
        moved.sequences = {
            name: value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
            for name, value in self.sequences.items()
        }
        return moved
