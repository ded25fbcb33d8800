"""Prefixes that several sequences of a micro-batch share, computed once.

Legend: B sequences, N tokens of the micro-batch, M tokens whose logprob is wanted, R tokens of the shared row.

The rollouts of a group have one prompt. Nothing before the first wanted token of a sequence depends on what comes
after, so the hidden states, keys and values of equal beginnings are equal, and one copy serves all:

    [prefix 1][rest 1.1][rest 1.2] ... [prefix 2][rest 2.1] ...

A rest continues the positions of its prefix; its queries see the prefix and, causally, the rest itself. The first
wanted token of each sequence is predicted by the last token of the prefix. Tokens that predict nothing wanted (the last
of a sequence, what follows the last wanted one, sequences without one) are left out. Apart from the order of
summation the result is that of the sequences one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from attrs import field, frozen
from torch import Tensor

from nemo_rl_core.models.numerics.packed_attention import Branches, Packing, plan_groups, runs
from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["SharedRow", "share_prefixes"]

_WORTH = 0.9
"""Share prefixes if at most this part of the work remains; gathering keys and masking are not free."""
_MAX_MASK = 2**26
"""Entries of all masks together; beyond, the mask-free kernels are the better choice."""
_BUNDLE = 16
"""Short rests of one prefix are attended together, up to so many tokens: the kernel is slow at a few queries a call."""


@frozen(eq=False)
class SharedRow:
    """A micro-batch as one row in which each prefix stands once."""

    source: Tensor
    """[R] token of the micro-batch that stands at each position of the row."""
    packing: Packing
    predictors: Tensor
    """[M] position in the row whose hidden state predicts each wanted token."""


@frozen
class _Bundle:
    """Neighbouring rests of one prefix."""

    prefix: int
    """Row position of the prefix."""
    depth: int
    """Tokens of the prefix."""
    start: int
    """Row position of the first rest."""
    lengths: tuple[int, ...]
    width: int = field(init=False)

    @width.default
    def _sum(self) -> int:
        return sum(self.lengths)


def share_prefixes(batch: BatchedDataDict, wanted: Tensor, *, pair_cost: float) -> SharedRow | None:
    """Lay out a micro-batch with its common prefixes once.

    Args:
        batch: At least one sequence, on the CPU; its `input_ids`.
        wanted: [M] ascending int64 tokens whose logprob is wanted, never the first of a sequence.
        pair_cost: Work of attending one query to one key, where that of a token in all other layers is 1.

    Returns:
        None if it would not save at least a tenth of the work.
    """
    if not len(wanted):
        return None
    # Of the sequences with a wanted token: where they start, tokens up to the first wanted one, and rows after those.
    sequence = torch.searchsorted(batch.offsets[1:], wanted, right=True)
    members, counts = torch.unique_consecutive(sequence, return_counts=True)
    ends = counts.cumsum(0)
    starts = batch.offsets[members]
    first, last = wanted[ends - counts], wanted[ends - 1]
    prefix, rest = (first - starts).tolist(), (last - first).tolist()
    layout = _Layout(starts.tolist(), prefix, rest, _equal_prefixes(batch["input_ids"], starts.tolist(), prefix))
    if not layout.pays(batch.lengths, pair_cost):
        return None
    prefix_row = torch.tensor(layout.prefix_row).repeat_interleave(counts)
    rest_row = torch.tensor(layout.rest_row).repeat_interleave(counts)
    after = wanted - first.repeat_interleave(counts)
    in_prefix = prefix_row + torch.tensor(prefix).repeat_interleave(counts) - 1
    predictors = torch.where(after == 0, in_prefix, rest_row + after - 1)
    source, packing = layout.build()
    return SharedRow(source, packing, predictors)


def _equal_prefixes(input_ids: Tensor, starts: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Return indices of sequences by the tokens of their prefixes in `input_ids` [N]."""
    tokens = input_ids.numpy()
    found: dict[bytes, list[int]] = {}
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        found.setdefault(tokens[start : start + length].tobytes(), []).append(i)
    return list(found.values())


class _Layout:
    """Positions of everything in the row.

    Args:
        starts: Token of the micro-batch at which each sequence starts.
        prefix: Tokens of each sequence's prefix, each >= 1.
        rest: Tokens of each sequence after the prefix that are needed, may be 0.
        groups: Indices of sequences of one prefix.
    """

    def __init__(
        self, starts: Sequence[int], prefix: Sequence[int], rest: Sequence[int], groups: Sequence[Sequence[int]]
    ) -> None:
        self.prefix_row = [0] * len(starts)
        self.rest_row = [0] * len(starts)
        self.lengths = [p + r for p, r in zip(prefix, rest, strict=True)]
        self.bundles: list[_Bundle] = []
        # Stretches of the row: (first token of the micro-batch, tokens, position of the first one)
        self.stretches: list[tuple[int, int, int]] = []
        self.trunks: list[tuple[int, int]] = []
        """(row position, tokens) of what is attended causally: prefixes, and sequences that share none."""
        row = 0
        for group in groups:
            depth = prefix[group[0]]
            trunk = depth if len(group) > 1 else self.lengths[group[0]]
            self.trunks.append((row, trunk))
            self.stretches.append((starts[group[0]], trunk, 0))
            rests = row + trunk
            for i in group:
                self.prefix_row[i] = row
            if len(group) == 1:
                self.rest_row[group[0]] = row + depth
            else:
                sizes = [rest[i] for i in group]
                for i, at in zip(group, accumulate([rests, *sizes]), strict=False):
                    self.rest_row[i] = at
                self.stretches += [(starts[i] + depth, rest[i], depth) for i in group]
                self.bundles += _bundles(row, depth, rests, sizes)
                rests += sum(sizes)
            row = rests
        self.num_rows = row
        self.buckets = _buckets(self.bundles)

    def pays(self, lengths: Tensor, pair_cost: float) -> bool:
        """Return whether the row is worth it, against sequences of lengths [B] one by one."""
        if sum(bucket.num_masked for bucket in self.buckets) > _MAX_MASK:
            return False
        pairs = [bucket.num_pairs for bucket in self.buckets]
        work = self.num_rows + pair_cost * (sum(n * n for _, n in self.trunks) / 2 + sum(pairs))
        plain = int(lengths.sum()) + pair_cost * float(lengths.double().square().sum()) / 2
        return work <= _WORTH * plain

    def build(self) -> tuple[Tensor, Packing]:
        """Return `SharedRow.source` [num_rows] and the packing."""
        first, sizes, offset = torch.tensor(self.stretches).unbind(1)
        row_start = sizes.cumsum(0) - sizes
        column = torch.arange(self.num_rows) - row_start.repeat_interleave(sizes)
        source = first.repeat_interleave(sizes) + column
        position_ids = offset.repeat_interleave(sizes) + column
        stretch = torch.arange(len(sizes)).repeat_interleave(sizes)
        unpad = torch.empty(self.num_rows, dtype=torch.int64)
        trunk_row, trunk_size = zip(*self.trunks, strict=True)
        groups, pad = plan_groups(trunk_size, torch.tensor(trunk_row), unpad)
        pads, key_pads = [pad], [pad]
        branches = []
        num_places = len(pad)
        for bucket in self.buckets:
            rows, real, keys = bucket.places()
            unpad[rows[real]] = num_places + real.reshape(-1).nonzero().squeeze(1)
            num_places += rows.numel()
            pads.append(rows.reshape(-1))
            key_pads.append(keys.reshape(-1))
            branches.append(Branches(len(bucket.bundles), bucket.width, bucket.depth, bucket.mask(stretch)))
        packing = Packing(
            lengths=tuple(self.lengths),
            groups=tuple(groups),
            pad=torch.cat(pads),
            unpad=unpad,
            position_ids=position_ids,
            branches=tuple(branches),
            key_pad=torch.cat(key_pads),
        )
        return source, packing


def _bundles(prefix: int, depth: int, start: int, lengths: Sequence[int]) -> list[_Bundle]:
    """Join neighbouring rests as long as they are short; a rest without tokens needs no place."""
    found: list[_Bundle] = []
    joined: list[int] = []
    for length in [*lengths, _BUNDLE + 1]:
        if joined and sum(joined) + length > _BUNDLE:
            found.append(_Bundle(prefix, depth, start, tuple(joined)))
            start += sum(joined)
            joined = []
        if length:
            joined.append(length)
    return found


@frozen
class _Bucket:
    """Bundles of similar size, attended in one call."""

    bundles: Sequence[_Bundle]
    width: int
    depth: int

    @property
    def num_pairs(self) -> int:
        """Queries times keys."""
        return len(self.bundles) * self.width * (self.depth + self.width)

    @property
    def num_masked(self) -> int:
        """Entries of the mask."""
        return self.num_pairs // len(self.bundles) * len(self._patterns())

    def _patterns(self) -> Sequence[_Bundle]:
        """The bundles that need a mask of their own: one for all if they are alike but for padding at the end."""
        forms = {(b.depth, b.lengths if len(b.lengths) > 1 else None) for b in self.bundles}
        return self.bundles if len(forms) > 1 else [max(self.bundles, key=lambda b: b.width)]

    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row positions.

        Returns:
            [count, width] of the queries, whether each is real, and [count, depth + width] of the keys.
        """
        return _places(self.bundles, self.width, self.depth)

    def mask(self, stretch: Tensor) -> Tensor:
        """[count or 1, 1, width, depth + width] bool; `stretch` [R] tells the rests apart."""
        patterns = self._patterns()
        rows, real, _ = _places(patterns, self.width, self.depth)
        owner = stretch[rows]
        own = (owner[:, :, None] == owner[:, None, :]) & real[:, None, :]
        own &= torch.ones(self.width, self.width, dtype=torch.bool).tril()
        depths = torch.tensor([b.depth for b in patterns])
        before = (torch.arange(self.depth) < depths[:, None])[:, None, :].expand(-1, self.width, -1)
        return torch.cat([before, own], dim=2)[:, None]


def _places(bundles: Sequence[_Bundle], width: int, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows and whether each is real, [B, width], and rows with those before them, [B, depth + width]."""
    prefix, depths, start, widths = torch.tensor([(b.prefix, b.depth, b.start, b.width) for b in bundles]).T[..., None]
    column = torch.arange(width)
    real = column < widths
    rows = torch.where(real, start + column, start)
    before = torch.arange(depth)
    return rows, real, torch.cat([torch.where(before < depths, prefix + before, prefix), rows], dim=1)


def _buckets(bundles: Sequence[_Bundle]) -> list[_Bucket]:
    """Bundles of similar prefixes, and of those the ones of similar width."""
    found = []
    for alike in runs([b.depth for b in bundles]):
        for members in runs([bundles[i].width for i in alike]):
            chosen = [bundles[alike[i]] for i in members]
            found.append(_Bucket(chosen, max(b.width for b in chosen), max(b.depth for b in chosen)))
    return found
