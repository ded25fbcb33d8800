"""Attention over packed sequences, for layers without Transformer Engine.

Legend: N tokens of this rank's row, P tokens of the whole row with its filling, H query heads, K key-value heads,
D head size, C context-parallel ranks.

With context parallelism each sequence is cut into 2C chunks, of which rank r has the r-th from the front and the r-th
from the back, so that causal attention is equal work for all. Keys and values of all ranks are gathered for each layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from nemo_rl_core.models.numerics.packed_attention import Packing, attend_packed
from nemo_rl_plugins_megatron._megatron import PackedSeqParams, mappings
from nemo_rl_plugins_megatron.cpu import attend_end_on_cpu

__all__ = ["ContextShare", "PackedAttention", "PackedRow", "attend_end"]


@frozen(kw_only=True, eq=False)
class ContextShare:
    """Which tokens of the row this rank has."""

    places: Tensor
    """[N] place in the whole row of each token of this rank."""
    order: Tensor
    """[P] for each place of the whole row, where it stands when the rows of all ranks follow one another."""
    chunks: tuple[tuple[int, int, int], ...]
    """(first place, end place, first place of its sequence) of each run of this rank's tokens, in their order."""
    group: Any
    """The context-parallel process group."""


@dataclass
class PackedRow(PackedSeqParams):
    """What megatron-core passes to attention, with our plan of the row."""

    packing: Packing | None = None
    """How the row is made up, where this rank has all of it."""
    share: ContextShare | None = None
    """Which part of it this rank has, with context parallelism."""


class PackedAttention(nn.Module):
    """Core attention, causal within each sequence of the row."""

    def __init__(self, config: Any, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedRow,
        **kwargs: object,
    ) -> Tensor:
        """[N, H, D] queries, [N, K, D] keys and values; returns [N, H * D]."""
        if packed_seq_params.share is None:
            assert packed_seq_params.packing is not None
            return attend_packed(query, key, value, packed_seq_params.packing).flatten(1)
        return _attend_share(query, key, value, packed_seq_params.share).flatten(1)


def _attend_share(query: Tensor, key: Tensor, value: Tensor, share: ContextShare) -> Tensor:
    """[N, H, D] of this rank's queries over the keys of all ranks."""
    both = torch.cat([key, value], dim=-1)
    # Backward sums what the queries of all ranks say about these keys.
    gathered = mappings.gather_from_sequence_parallel_region(both, tensor_parallel_output_grad=True, group=share.group)
    keys, values = gathered.index_select(0, share.order).chunk(2, dim=-1)
    parts, start = [], 0
    for first, end, begin in share.chunks:
        q = query[start : start + end - first].transpose(0, 1)[None]
        k, v = (x[begin:end].transpose(0, 1)[None] for x in (keys, values))
        attend = attend_end_on_cpu if query.device.type == "cpu" else attend_end
        parts.append(attend(q, k, v))
        start += end - first
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def attend_end(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of the last n of m tokens, [1, H, n, D] queries over [1, K, m, D] keys; a GPU makes no [n, m].

    The kernels that need no scores in memory know this causal form by name, not as a mask, and heads of one number.
    """
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    bias: Any = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
