"""Causal attention over sequences that are packed into a single row.

Legend: N tokens of the row, S sequences, H query heads, K key-value heads, D head size, T longest length,
P places of the sequences with the padding of their groups.

Sequences of similar length are attended in one call: they are gathered into [S, T] with padding at the right,
which causal attention never lets a real query see, so that no mask is needed and no [N, N] matrix exists.
Linear layers see the N real tokens only.

Where sequences continue one prefix that stands in the row once (`Packing.branches`), its keys and values are gathered
again for each call that needs them, and a mask says what a query sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from attrs import define, evolve, frozen
from torch import Tensor

from nemo_rl_core.models.numerics.autograd import AutogradContext

__all__ = ["Branches", "Packing", "attend_packed", "plan_groups", "runs"]

_MAX_WASTE = 0.25
"""Share of padding that a group of sequences may hold; fewer, larger calls are worth that much."""
_MAX_WASTE_CPU = 0.1
"""There a call costs little beside its work, which grows with the square of the width."""


@frozen(eq=False)
class Branches:
    """One call of the attention kernel for what continues prefixes."""

    count: int
    """Stretches of the row, each of one or more sequences that continue one prefix."""
    width: int
    """Places for the tokens of a stretch."""
    depth: int
    """Places for the tokens of a prefix."""
    mask: Tensor
    """[count or 1, 1, width, depth + width] bool, True where a query sees a key."""


@define(eq=False)
class Packing:
    """How one row is made up of sequences; made once per micro-batch, used by every layer."""

    lengths: tuple[int, ...]
    """Tokens of each sequence, a prefix that stands elsewhere in the row included."""
    groups: tuple[tuple[int, int], ...]
    """(sequences, width) of each causal call of the attention kernel."""
    pad: Tensor | None
    """[P] row position of each place of the groups, one after another (padding repeats the first token of its
    sequence); None when the sequences are of one length, and the row is the group as it stands."""
    unpad: Tensor | None
    """[N] place of each token of the row."""
    position_ids: Tensor
    """[N] int64 position of each token in its own sequence."""
    branches: tuple[Branches, ...] = ()
    """The calls for what continues prefixes; their queries have their places after those of the groups."""
    key_pad: Tensor | None = None
    """Row position of each place of keys and values, if prefixes are shared; else `pad` serves."""
    record: list[int | None] | None = None
    """If set, each call of the attention function appends the window it was told."""

    @property
    def max_length(self) -> int:
        """Length of the longest sequence."""
        return max(self.lengths)

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Packing:
        """Plan the row of sequences of these lengths (each >= 1) for a device; the tensors are on the CPU."""
        sizes = torch.as_tensor(lengths, dtype=torch.int64)
        cumulative = F.pad(sizes.cumsum(0), (1, 0))
        total = int(cumulative[-1])
        position_ids = torch.arange(total) - cumulative[:-1].repeat_interleave(sizes, output_size=total)
        values = sizes.tolist()
        pad = unpad = None
        if min(values) == max(values):
            groups = [(len(values), values[0])]
        else:
            unpad = torch.empty(total, dtype=torch.int64)
            waste = _MAX_WASTE_CPU if torch.device(device).type == "cpu" else _MAX_WASTE
            groups, pad = plan_groups(values, cumulative[:-1], unpad, waste=waste)
        return Packing(tuple(values), tuple(groups), pad, unpad, position_ids)

    def to(self, device: torch.device | str) -> Packing:
        """The same plan with its tensors on `device`."""

        def move(tensor: Tensor) -> Tensor:
            """Copy one of the plan's tensors, of any shape [...]."""
            return tensor.to(device, non_blocking=True)

        return evolve(
            self,
            pad=None if self.pad is None else move(self.pad),
            unpad=None if self.unpad is None else move(self.unpad),
            position_ids=move(self.position_ids),
            branches=tuple(evolve(branch, mask=move(branch.mask)) for branch in self.branches),
            key_pad=None if self.key_pad is None else move(self.key_pad),
        )


def plan_groups(
    lengths: Sequence[int], starts: Tensor, unpad: Tensor, *, waste: float = _MAX_WASTE
) -> tuple[list[tuple[int, int]], Tensor]:
    """Groups of sequences of similar length, and the places of their tokens.

    Args:
        lengths: Tokens of each sequence.
        starts: [S] row position of each sequence's first token.
        unpad: [N] filled at the tokens of these sequences, see `Packing`.
        waste: Share of padding that a group may hold.

    Returns:
        `Packing.groups` and `Packing.pad`.
    """
    groups: list[tuple[int, int]] = []
    pads: list[Tensor] = []
    num_places = 0
    sizes = torch.as_tensor(lengths)
    for members in runs(lengths, waste):
        index = torch.tensor(members)
        width = lengths[members[0]]
        column = torch.arange(width)
        real = column < sizes[index][:, None]
        start = starts[index][:, None]
        rows = torch.where(real, start + column, start)
        unpad[rows[real]] = num_places + real.reshape(-1).nonzero().squeeze(1)
        pads.append(rows.reshape(-1))
        groups.append((len(members), width))
        num_places += len(members) * width
    return groups, torch.cat(pads)


def runs(lengths: Sequence[int], waste: float = _MAX_WASTE) -> list[list[int]]:
    """Indices from the longest to the shortest, cut where the share of padding would pass `waste`."""
    grouped: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if grouped and tokens + lengths[i] >= (1 - waste) * lengths[grouped[-1][0]] * (len(grouped[-1]) + 1):
            grouped[-1].append(i)
            tokens += lengths[i]
        else:
            grouped.append([i])
            tokens = lengths[i]
    return grouped


class _IndexContext(AutogradContext, Protocol):
    saved_tensors: tuple[Tensor]
    num_rows: int
    """Length of the input's first axis."""


class _Pad(torch.autograd.Function):
    """`x[pad]`. The gradient in padding is 0, so its gradient is a selection too, not an addition."""

    @staticmethod
    def forward(ctx: _IndexContext, x: Tensor, pad: Tensor, unpad: Tensor) -> Tensor:
        """Select rows of `x` [N, ...] by `pad` [P]: [P, ...]. `unpad` [N] undoes it."""
        ctx.save_for_backward(unpad)
        return x.index_select(0, pad)

    @staticmethod
    def backward(ctx: _IndexContext, grad: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of `x` [N, ...], given that of the result [P, ...]."""
        (unpad,) = ctx.saved_tensors
        return grad.index_select(0, unpad), None, None


class _Repeat(torch.autograd.Function):
    """`x[places]`, where a row may have many places; its gradient is their sum."""

    @staticmethod
    def forward(ctx: _IndexContext, x: Tensor, places: Tensor) -> Tensor:
        """Select rows of `x` [N, ...] by `places`, one for each place of keys and values: [places, ...]."""
        ctx.save_for_backward(places)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: _IndexContext, grad: Tensor) -> tuple[Tensor, None]:
        """Gradient of `x` [N, ...], given that of the result [places, ...]."""
        (places,) = ctx.saved_tensors
        out = grad.new_zeros(ctx.num_rows, *grad.shape[1:])
        return out.index_add_(0, places, grad), None


class _Unpad(torch.autograd.Function):
    """`x[unpad]`, with gradient 0 in padding."""

    @staticmethod
    def forward(ctx: _IndexContext, x: Tensor, unpad: Tensor) -> Tensor:
        """Select the rows of `x` [P, ...] that `unpad` [N] names: [N, ...]."""
        ctx.save_for_backward(unpad)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, unpad)

    @staticmethod
    def backward(ctx: _IndexContext, grad: Tensor) -> tuple[Tensor, None]:
        """Gradient of `x` [P, ...], given that of the result [N, ...]."""
        (unpad,) = ctx.saved_tensors
        out = grad.new_zeros(ctx.num_rows, *grad.shape[1:])
        return out.index_copy_(0, unpad, grad), None


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention within each sequence of one row.

    Args:
        query: [N, H, D].
        key: [N, K, D]; K divides H.
        value: [N, K, D].
        packing: How the row is made up.
        scaling: Factor on the scores; None is D ** -0.5.
        sliding_window: A query sees this many last positions, its own included; None is all.

    Returns:
        [N, H, D].
    """
    streams = [query, key, value]
    window = sliding_window if sliding_window is not None and sliding_window < packing.max_length else None
    if packing.key_pad is not None:
        assert window is None, "prefixes are not shared where a sequence is longer than the window"
        outputs = _attend_shared(packing, scaling, *streams)
    else:
        if packing.pad is not None:
            streams = [_Pad.apply(x, packing.pad, packing.unpad) for x in streams]  # type: ignore[no-untyped-call]
        sizes = [count * width for count, width in packing.groups]
        parts = zip(packing.groups, *(torch.split(x, sizes) for x in streams), strict=True)
        outputs = [_attend(q, k, v, group, scaling, window) for group, q, k, v in parts]
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if packing.unpad is not None:
        joined = _Unpad.apply(joined, packing.unpad)  # type: ignore[no-untyped-call]
    return joined


def _attend(
    q: Tensor, k: Tensor, v: Tensor, group: tuple[int, int], scaling: float | None, window: int | None
) -> Tensor:
    """One group, [sequences * width, heads, D] in and out."""
    count, width = group
    q, k, v = (x.reshape(count, width, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    mask = None if window is None or window >= width else _window_mask(width, window, q.device)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).reshape(count * width, q.shape[1], v.shape[-1])


def _attend_shared(packing: Packing, scaling: float | None, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Groups, then branches; each [places, heads, D]."""
    query = _Pad.apply(query, packing.pad, packing.unpad)  # type: ignore[no-untyped-call]
    key, value = (_Repeat.apply(x, packing.key_pad) for x in (key, value))  # type: ignore[no-untyped-call]
    sizes = [count * width for count, width in packing.groups]
    branches = packing.branches
    queries = torch.split(query, [*sizes, *(b.count * b.width for b in branches)])
    key_sizes = [*sizes, *(b.count * (b.depth + b.width) for b in branches)]
    parts = list(zip(queries, torch.split(key, key_sizes), torch.split(value, key_sizes), strict=True))
    outputs = [_attend(*part, group, scaling, None) for part, group in zip(parts, packing.groups, strict=False)]
    outputs += [_attend_branches(*part, b, scaling) for part, b in zip(parts[len(sizes) :], branches, strict=True)]
    return outputs


def _attend_branches(q: Tensor, k: Tensor, v: Tensor, branches: Branches, scaling: float | None) -> Tensor:
    """One call, [count * width, heads, D] in and out, keys and values [count * (depth + width), heads, D]."""
    q, k, v = (x.reshape(branches.count, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    shares_heads = q.shape[1] != k.shape[1]
    if shares_heads and q.device.type != "cpu":  # no kernel but the slow one takes a mask and shared heads there
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        shares_heads = False
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=branches.mask, scale=scaling, enable_gqa=shares_heads)
    return out.transpose(1, 2).reshape(branches.count * branches.width, q.shape[1], v.shape[-1])


def _window_mask(width: int, window: int, device: torch.device) -> Tensor:
    """[T, T] bool: within one sequence, the last `window` positions."""
    ones = torch.ones(width, width, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)
