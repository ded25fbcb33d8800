"""Answers with a verdict as batches, and how far the policy has moved at large.

The KL of the policy to the reference is estimated on prompts with answers that were given to other prompts: such an
answer tells of the policy's drift and nothing of the verdict (KTO, arXiv:2402.01306, sec. 4.1). As in its authors' code
the answers are those of the row before, so that every answer is used once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from nemo_rl_core.records.batch import BatchedDataDict

if TYPE_CHECKING:
    from nemo_rl_core.data.encoding import ConversationEncoder
    from nemo_rl_core.data.preferences import LabelledAnswer
    from nemo_rl_core.protocols.algorithm import Model

__all__ = ["add_kl_estimate", "labelled_batch"]

_MISMATCHED = "mismatched"


def labelled_batch(rows: Sequence[Sequence[LabelledAnswer]], encoder: ConversationEncoder) -> BatchedDataDict:
    """One sequence for each answer.

    Args:
        rows: The answers of each row.
        encoder: Tokenises conversations.

    Returns:
        The encoder's fields, `is_chosen` [B] bool (good), `group_ids` [B] int64 (the row), and, as a list, the tokens
        and masks of each prompt with an answer of the row before, for `add_kl_estimate`.
    """
    given = [(number, answer) for number, row in enumerate(rows) for answer in row]
    batch = encoder.batch([[*answer.prompt, *answer.answer] for _, answer in given])
    filled = [row for row in rows if row]
    mismatched = [
        [*answer.prompt, *before[place % len(before)].answer]
        for row, before in zip(filled, [*filled[-1:], *filled[:-1]], strict=True)
        for place, answer in enumerate(row)
    ]
    other = encoder.batch(mismatched)
    batch.set_sequences("is_chosen", torch.tensor([answer.good for _, answer in given], dtype=torch.bool))
    batch.set_sequences("group_ids", torch.tensor([number for number, _ in given], dtype=torch.int64))
    batch.set_sequences(_MISMATCHED, list(zip(other.unpack("input_ids"), other.unpack("loss_mask"), strict=True)))
    return batch


def add_kl_estimate(batch: BatchedDataDict, policy: Model, reference: Model) -> None:
    """Add `kl_estimate` [B] float32, the same number for every sequence; the mismatched sequences leave the batch.

    It is the mean of log(policy / reference) of whole mismatched answers, and not below 0.
    """
    mismatched = batch.sequences.pop(_MISMATCHED)
    if not mismatched:  # a batch of ties
        batch.set_sequences("kl_estimate", torch.zeros(0))
        return
    others = BatchedDataDict(
        [len(ids) for ids, _ in mismatched],
        {
            "input_ids": torch.cat([ids for ids, _ in mismatched]),
            "loss_mask": torch.cat([mask for _, mask in mismatched]),
        },
    )
    ratios = others.sum_per_sequence(policy.logprobs(others) - reference.logprobs(others))
    batch.set_sequences("kl_estimate", ratios.mean().clamp(min=0).expand(len(batch)).clone())
