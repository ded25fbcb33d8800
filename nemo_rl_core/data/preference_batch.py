"""Batches of preference pairs, and the positions of the two answers of each pair.

Legend: P pairs, B = 2 P sequences, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from nemo_rl_core.data.encoding import ConversationEncoder
from nemo_rl_core.data.preferences import PreferencePair
from nemo_rl_core.errors import ShapeMismatch
from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["pair_positions", "preference_batch"]


def preference_batch(pairs: Sequence[PreferencePair], encoder: ConversationEncoder) -> BatchedDataDict:
    """Two sequences for each pair, the chosen one first, with the same `group_ids`.

    A pair trains only as a whole: where the pair is a tie, or one answer has no token to train (its prompt fills the
    context), both leave `loss_mask`.

    Returns:
        The encoder's fields, and `group_ids` [B] int64, `is_chosen` [B] bool, `margins` [B] float32 (0 where the row
        names none).
    """
    conversations = chain.from_iterable(([*p.prompt, *p.chosen], [*p.prompt, *p.rejected]) for p in pairs)
    batch = encoder.batch(list(conversations))
    trained = batch.sum_per_sequence(batch["loss_mask"].long()).view(-1, 2) > 0
    usable = trained.all(1) & ~torch.tensor([pair.tie for pair in pairs], dtype=torch.bool)
    both = usable.repeat_interleave(2)
    batch.set_tokens("loss_mask", batch["loss_mask"] & batch.expand_to_tokens(both))
    batch.set_sequences("group_ids", torch.arange(len(pairs)).repeat_interleave(2))
    batch.set_sequences("is_chosen", torch.tensor([True, False] * len(pairs), dtype=torch.bool))
    margins = torch.tensor([pair.margin or 0.0 for pair in pairs], dtype=torch.float32)
    batch.set_sequences("margins", margins.repeat_interleave(2))
    return batch


def pair_positions(batch: BatchedDataDict) -> tuple[Tensor, Tensor]:
    """Sequences of the chosen and of the rejected answers, [P] int64 each, in one order.

    Only pairs of which both have a trained token.

    Raises:
        ShapeMismatch: A group is not one chosen and one rejected sequence.
    """
    groups, is_chosen = batch["group_ids"], batch["is_chosen"]
    chosen, rejected = (side.nonzero().squeeze(1) for side in (is_chosen, ~is_chosen))
    chosen, rejected = chosen[groups[chosen].argsort()], rejected[groups[rejected].argsort()]
    paired = len(chosen) == len(rejected) and torch.equal(groups[chosen], groups[rejected])
    if not paired or torch.unique(groups).numel() != len(chosen):
        raise ShapeMismatch(
            f"{len(chosen)} chosen and {len(rejected)} rejected sequences are not pairs by `group_ids`: each group "
            'must hold one of both. A loss that compares them declares unit = "group" and gets them together.'
        )
    trained = batch.sum_per_sequence(batch["loss_mask"].long()) > 0
    kept = trained[chosen] & trained[rejected]
    return chosen[kept], rejected[kept]
