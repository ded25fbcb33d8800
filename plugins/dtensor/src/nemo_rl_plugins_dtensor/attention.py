"""Causal attention over sequences that stand one after another in a single row.

Legend: N tokens of the row, S sequences, H query heads, K key-value heads, D head size, T longest length,
P places of the sequences with the padding of their groups.

Sequences of similar length are attended in one call: they are gathered into [S, T] with padding at the right,
which causal attention never lets a real query see, so that no mask is needed and no [N, N] matrix exists.
Linear layers see the N real tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from attrs import define, evolve
from torch import Tensor, nn
from transformers import AttentionInterface

from nemo_rl_core._errors import ConfigError

__all__ = ["ATTENTION_NAME", "Packing", "packed_attention"]

ATTENTION_NAME = "nemo_rl_packed"
_MAX_WASTE = 0.25
"""Share of padding that a group of sequences may hold; fewer, larger calls are worth that much."""


@define(eq=False)
class Packing:
    """How one row is made up of sequences; made once per micro-batch, used by every layer."""

    lengths: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]
    """(sequences, width) of each call of the attention kernel."""
    pad: Tensor | None
    """[P] row position of each place of the groups, one after another (padding repeats the first token of its
    sequence); None when the sequences are of one length, and the row is the group as it stands."""
    unpad: Tensor | None
    """[N] place of each token of the row."""
    position_ids: Tensor
    """[N] int64 position of each token in its own sequence."""
    record: list[int | None] | None = None
    """If set, each call of the attention function appends the window it was told."""

    @property
    def max_length(self) -> int:
        """Length of the longest sequence."""
        return max(self.lengths)

    @staticmethod
    def of(lengths: Sequence[int]) -> Packing:
        """Plan the row of sequences of these lengths (each >= 1)."""
        sizes = torch.as_tensor(lengths, dtype=torch.int64)
        cumulative = F.pad(sizes.cumsum(0), (1, 0))
        total = int(cumulative[-1])
        position_ids = torch.arange(total) - cumulative[:-1].repeat_interleave(sizes, output_size=total)
        values = sizes.tolist()
        pad = unpad = None
        if min(values) == max(values):
            groups = [(len(values), values[0])]
        else:
            groups, pad, unpad = _plan(values, cumulative)
        return Packing(tuple(values), tuple(groups), pad, unpad, position_ids)

    def to(self, device: torch.device | str) -> Packing:
        """The same plan with its tensors on `device`."""

        def move(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return evolve(
            self,
            pad=move(self.pad),
            unpad=move(self.unpad),
            position_ids=move(self.position_ids),
        )


def _plan(lengths: Sequence[int], cumulative: Tensor) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
    """Groups of sequences of similar length, and the places of their tokens."""
    groups: list[tuple[int, int]] = []
    pads: list[Tensor] = []
    unpad = torch.empty(int(cumulative[-1]), dtype=torch.int64)
    num_places = 0
    sizes = torch.as_tensor(lengths)
    for members in _runs(lengths):
        index = torch.tensor(members)
        width = lengths[members[0]]
        column = torch.arange(width)
        real = column < sizes[index][:, None]
        start = cumulative[index][:, None]
        rows = torch.where(real, start + column, start)
        unpad[rows[real]] = num_places + real.reshape(-1).nonzero().squeeze(1)
        pads.append(rows.reshape(-1))
        groups.append((len(members), width))
        num_places += len(members) * width
    return groups, torch.cat(pads), unpad


def _runs(lengths: Sequence[int]) -> list[list[int]]:
    """Sequences from the longest to the shortest, cut where the share of padding would pass `_MAX_WASTE`."""
    runs: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if runs and tokens + lengths[i] >= (1 - _MAX_WASTE) * lengths[runs[-1][0]] * (len(runs[-1]) + 1):
            runs[-1].append(i)
            tokens += lengths[i]
        else:
            runs.append([i])
            tokens = lengths[i]
    return runs


class _Pad(torch.autograd.Function):
    """`x[pad]`. The gradient in padding is 0, so its gradient is a selection too, not an addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pad: Tensor, unpad: Tensor) -> Tensor:
        ctx.save_for_backward(unpad)
        return x.index_select(0, pad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (unpad,) = ctx.saved_tensors
        return grad.index_select(0, unpad), None, None


class _Unpad(torch.autograd.Function):
    """`x[unpad]`, with gradient 0 in padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unpad: Tensor) -> Tensor:
        ctx.save_for_backward(unpad)
        ctx.num_places = x.shape[0]
        return x.index_select(0, unpad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (unpad,) = ctx.saved_tensors
        out = grad.new_zeros(ctx.num_places, *grad.shape[1:])
        return out.index_copy_(0, unpad, grad), None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of one row, in the form `transformers` calls.

    Args:
        module: The attention layer (not used).
        query: [1, H, N, D].
        key: [1, K, N, D].
        value: [1, K, N, D].
        attention_mask: Must be None.
        packing: How the row is made up.
        scaling: Factor on the scores; None is D ** -0.5.
        dropout: Must be 0.
        sliding_window: A query sees this many last positions, its own included; None is all.
        softcap: Must be None; scores cannot be capped here.
        kwargs: What other attention functions want.

    Returns:
        [1, N, H, D], and no attention weights.

    Raises:
        ConfigError: The layer asks for something that this function does not do.
    """
    if attention_mask is not None or dropout or softcap is not None or kwargs.get("s_aux") is not None:
        raise ConfigError(
            f"{type(module).__name__} asks packed attention for a mask, dropout, capped scores or attention sinks, "
            "which it does not do. Set policy.options.attention: padded."
        )
    if packing.record is not None:
        packing.record.append(sliding_window)
    # [N, heads, D]
    streams = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
    if packing.pad is not None:
        streams = [_Pad.apply(x, packing.pad, packing.unpad) for x in streams]  # type: ignore[no-untyped-call]
    window = sliding_window if sliding_window is not None and sliding_window < packing.max_length else None
    sizes = [count * width for count, width in packing.groups]
    parts = zip(packing.groups, *(x.split(sizes) for x in streams), strict=True)
    outputs = [_attend(q, k, v, group, scaling, window) for group, q, k, v in parts]
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if packing.unpad is not None:
        joined = _Unpad.apply(joined, packing.unpad)  # type: ignore[no-untyped-call]
    return joined.unsqueeze(0), None


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


def _window_mask(width: int, window: int, device: torch.device) -> Tensor:
    """[T, T] bool: within one sequence, the last `window` positions."""
    ones = torch.ones(width, width, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)


AttentionInterface.register(ATTENTION_NAME, packed_attention)
