"""How one megatron-core weight is made of Hugging Face weights, and the other way round.

A `Rule` names the weights on both sides and the `Form` between them. A form cuts the part of one of several ranks out
of the Hugging Face tensors, of which no more is read, and joins the parts of all ranks to the whole again, exactly:
both are slicing and concatenation. `families.py` lists the rules of each model family.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from attrs import frozen
from torch import Tensor

__all__ = [
    "Columns",
    "Form",
    "FusedGate",
    "Gate",
    "Heads",
    "QueryKeyValue",
    "Readable",
    "Rows",
    "Rule",
    "Vocabulary",
    "Whole",
]


class Readable(Protocol):
    """A tensor in memory, or one in a file of which parts can be read."""

    @property
    def shape(self) -> Sequence[int]:
        """Of the whole."""

    def __getitem__(self, where: Any) -> Tensor:
        """A part: one slice, or one for each of the first dimensions."""


@frozen(kw_only=True)
class Heads:
    """Sizes that forms need."""

    num_groups: int
    """Key-value heads."""
    head_size: int
    vocab_size: int


class Form:
    """Cuts and joins; the parts belong to tensor-parallel ranks."""

    def cut(self, whole: Sequence[Readable], index: int, size: int, heads: Heads) -> Tensor:
        """Return the part [...] of rank `index` of `size`."""
        raise NotImplementedError

    def join(self, parts: Sequence[Tensor], heads: Heads) -> list[Tensor]:
        """Return the whole Hugging Face tensors [...] from the parts of all ranks."""
        raise NotImplementedError


class Whole(Form):
    """Every rank holds the whole."""

    def cut(self, whole: Sequence[Readable], index: int, size: int, heads: Heads) -> Tensor:
        """Return the whole tensor [...]."""
        return whole[0][:]

    def join(self, parts: Sequence[Tensor], heads: Heads) -> list[Tensor]:
        """Return the first rank's tensor [...]."""
        return [parts[0]]


@frozen
class _Along(Form):
    dim: int

    def cut(self, whole: Sequence[Readable], index: int, size: int, heads: Heads) -> Tensor:
        """Return the share of the rank, 1 / size of the tensor [...] along the dimension."""
        share = whole[0].shape[self.dim] // size
        return whole[0][(slice(None),) * self.dim + (slice(index * share, (index + 1) * share),)]

    def join(self, parts: Sequence[Tensor], heads: Heads) -> list[Tensor]:
        """Return the shares one after another, as one tensor [...]."""
        return [torch.cat(list(parts), dim=self.dim)]


def Rows() -> Form:
    """Ranks share the output features."""
    return _Along(0)


def Columns() -> Form:
    """Ranks share the input features."""
    return _Along(1)


class Vocabulary(Form):
    """Ranks share the rows; the vocabulary is filled up with zero rows to a multiple of the ranks."""

    def cut(self, whole: Sequence[Readable], index: int, size: int, heads: Heads) -> Tensor:
        """Return the rank's rows [share, E] of a vocabulary, the last rank's filled with zeros."""
        share = -(-heads.vocab_size // size)
        rows = whole[0][min(index * share, heads.vocab_size) : min((index + 1) * share, heads.vocab_size)]
        return torch.cat([rows, rows.new_zeros(share - len(rows), *rows.shape[1:])]) if len(rows) < share else rows

    def join(self, parts: Sequence[Tensor], heads: Heads) -> list[Tensor]:
        """Return all rows [V, E] without the filling."""
        return [torch.cat(list(parts))[: heads.vocab_size]]


def _rows(tensor: Readable, count: int, number: int) -> Tensor:
    """The stretch of so many rows with this number."""
    return tensor[number * count : (number + 1) * count]


class Gate(Form):
    """The gate and up projections of a gated MLP in one: each rank has its rows of both."""

    def cut(self, whole: Sequence[Readable], index: int, size: int, heads: Heads) -> Tensor:
        """Return the rank's gate rows, then its up rows: [2 * F / size, E]."""
        return torch.cat([_rows(tensor, tensor.shape[0] // size, index) for tensor in whole])

    def join(self, parts: Sequence[Tensor], heads: Heads) -> list[Tensor]:
        """Return gate and up, [F, E] each."""
        halves = [part.chunk(2) for part in parts]
        return [torch.cat([half[i] for half in halves]) for i in range(2)]


class FusedGate(Gate):
    """`Gate` where Hugging Face too has both in one tensor."""

    def cut(self, whole: Sequence[Readable], index: int, size: int, heads: Heads) -> Tensor:
        """Return the rank's gate rows, then its up rows: [2 * F / size, E]."""
        return torch.cat([_rows(whole[0], whole[0].shape[0] // (2 * size), half * size + index) for half in range(2)])

    def join(self, parts: Sequence[Tensor], heads: Heads) -> list[Tensor]:
        """Return gate and up, one after the other: [2 * F, E]."""
        return [torch.cat(super().join(parts, heads))]


class QueryKeyValue(Form):
    """Queries, keys and values in one: for each key-value head its query heads, then itself, then its values."""

    def cut(self, whole: Sequence[Readable], index: int, size: int, heads: Heads) -> Tensor:
        """Return the rank's key-value heads with all that belongs to them [rows, E], or its rows of a shared head."""
        groups, shared = max(heads.num_groups // size, 1), max(size // heads.num_groups, 1)
        mine = [_rows(tensor, tensor.shape[0] // heads.num_groups * groups, index // shared) for tensor in whole]
        by_group = [tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in mine]
        return torch.cat(by_group, dim=1).flatten(0, 1).chunk(shared)[index % shared]

    def join(self, parts: Sequence[Tensor], heads: Heads) -> list[Tensor]:
        """Return queries, keys and values, [rows, E] each."""
        fused = torch.cat(list(parts))
        by_group = fused.reshape(heads.num_groups, -1, *fused.shape[1:])
        queries = by_group.shape[1] - 2 * heads.head_size
        split = by_group.split([queries, heads.head_size, heads.head_size], dim=1)
        return [tensor.flatten(0, 1) for tensor in split]


@frozen
class Rule:
    """One weight of megatron-core and what it is made of.

    `{layer}` in a name stands for the number of the layer, counted over the whole model, and `{expert}` in ours for
    that of the expert, which is the first dimension of theirs.
    """

    ours: str
    theirs: tuple[str, ...]
    form: Form

    @property
    def per_layer(self) -> bool:
        """Whether each layer has such a weight."""
        return "{layer}" in self.ours

    @property
    def per_expert(self) -> bool:
        """Whether each expert has such a weight."""
        return "{expert}" in self.ours
