"""One micro-batch as a row of tokens, and this rank's part of it.

Legend: N tokens of the micro-batch, P tokens of the row with its filling, R tokens that this rank's layers see,
M tokens whose logprob this rank computes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor

from nemo_rl_core.models.numerics.packed_attention import Packing
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_plugins_megatron.attention import ContextShare, PackedRow

if TYPE_CHECKING:
    from nemo_rl_plugins_megatron.parallel import Ranks

__all__ = ["Row"]


@frozen(kw_only=True, eq=False)
class Row:
    """One micro-batch on the device, ready for the model."""

    input_ids: Tensor
    """[1, R]"""
    position_ids: Tensor
    """[1, R]"""
    packed: PackedRow
    num_tokens: int
    """N"""
    places: Tensor
    """[N] place in this rank's row of each token of the micro-batch, or -1 if another rank has it."""
    wanted: Tensor
    """[M] tokens of the micro-batch whose logprob is computed here, never the first of a sequence."""
    predictors: Tensor
    """[M] places in this rank's row of the tokens before them, whose hidden states predict them."""
    targets: Tensor
    """[M] the wanted tokens."""
    top_ids: Tensor | None = None
    """[M, ...] other tokens in place of each, whose logprobs are wanted too."""

    @staticmethod
    def of(
        batch: BatchedDataDict, ranks: Ranks, *, only_trained: bool, split_tokens: bool, with_top_ids: bool = False
    ) -> Row:
        """Prepare a micro-batch that lies on the CPU.

        Args:
            batch: At least one sequence; its `input_ids`, and `loss_mask` if there is one.
            ranks: This process's place.
            only_trained: Want only the tokens whose `loss_mask` is True.
            split_tokens: Tensor-parallel ranks share the tokens, whose number must be a multiple of theirs.
            with_top_ids: Take `top_ids` of the batch along.
        """
        multiple = 2 * ranks.cp_size if ranks.cp_size > 1 else 1
        lengths = [-(-length // multiple) * multiple for length in batch.lengths.tolist()]
        total_multiple = math.lcm(multiple, ranks.cp_size * ranks.tp_size) if split_tokens else multiple
        if rest := -sum(lengths) % total_multiple:
            lengths.append(rest)  # a sequence of nothing but filling
        starts = torch.tensor([0, *lengths]).cumsum(0)
        row_places = batch.position_ids + batch.expand_to_tokens(starts[: len(batch)])
        ids = torch.zeros(int(starts[-1]), dtype=torch.int64)
        ids[row_places] = batch["input_ids"]
        position_ids = torch.cat([torch.arange(length) for length in lengths])
        packing, share = None, None
        if ranks.cp_size == 1:
            packing = Packing.of(lengths).to(ranks.device)
            local = torch.arange(len(ids))
        else:
            share = _share(lengths, ranks)
            local = share.places.cpu()
        here = torch.full((len(ids),), -1)
        here[local] = torch.arange(len(local))
        places = here[row_places]
        want = batch.position_ids > 0
        if only_trained and "loss_mask" in batch:
            want = want & batch["loss_mask"]
        wanted = want.nonzero().squeeze(1)
        wanted = wanted[places[wanted - 1] >= 0]
        cumulative = starts.to(torch.int32).to(ranks.device)
        longest = max(lengths)

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(ranks.device, non_blocking=True)

        return Row(
            input_ids=move(ids[local])[None],
            position_ids=move(position_ids[local])[None],
            packed=PackedRow(
                qkv_format="thd",
                cu_seqlens_q=cumulative,
                cu_seqlens_kv=cumulative,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
                packing=packing,
                share=share,
            ),
            num_tokens=batch.num_tokens,
            places=move(places),
            wanted=move(wanted),
            predictors=move(places[wanted - 1]),
            targets=move(batch["input_ids"][wanted]),
            top_ids=move(batch["top_ids"][wanted]) if with_top_ids else None,
        )


def _share(lengths: list[int], ranks: Ranks) -> ContextShare:
    """Chunk r from the front and chunk r from the back of each sequence."""
    by_rank: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks.cp_size)]
    begin = 0
    for length in lengths:
        size = length // (2 * ranks.cp_size)
        for rank, chunks in enumerate(by_rank):
            for index in (rank, 2 * ranks.cp_size - 1 - rank):
                chunks.append((begin + index * size, begin + (index + 1) * size, begin))
        begin += length
    rows = [torch.cat([torch.arange(first, end) for first, end, _ in chunks]) for chunks in by_rank]
    return ContextShare(
        places=rows[ranks.cp_index].to(ranks.device),
        order=torch.cat(rows).argsort().to(ranks.device),
        chunks=tuple(by_rank[ranks.cp_index]),
        group=ranks.cp_group,
    )
