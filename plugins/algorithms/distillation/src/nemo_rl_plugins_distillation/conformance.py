"""What the conformance kits cannot know: the fields of a teacher that the losses and advantages read.

Legend: N tokens, B sequences, V = 7 ids of the kit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_rl_core.models.numerics.over_vocabulary import OutputLayer
from nemo_rl_core.records.shared_value import SharedValue, hold
from nemo_rl_plugins_distillation.chunks import NEVER

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = [
    "add_hidden_teachers",
    "add_projected_teacher",
    "add_sorted_teacher",
    "add_teacher_logprobs",
    "add_teachers",
    "hidden_layers",
]

_V = 7


def add_teachers(batch: BatchedDataDict, generator: torch.Generator) -> None:
    """Two teachers that name three tokens each, weighed differently in each sequence."""
    logits = torch.randn(batch.num_tokens, 2, _V, generator=generator, dtype=torch.float64)
    top = torch.log_softmax(logits, -1).topk(3, dim=-1)
    batch.set_tokens("top_ids", top.indices)
    batch.set_tokens("teacher_top_logprobs", top.values)
    weights = torch.rand(len(batch), 1, generator=generator, dtype=torch.float64)
    batch.set_sequences("teacher_weights", torch.cat([weights, 1 - weights], 1))


def add_hidden_teachers(batch: BatchedDataDict, generator: torch.Generator) -> None:
    """Hidden states of one number for the two output layers of `hidden_layers`; some rows have one teacher alone."""
    for index in range(2):
        batch.set_tokens(f"teacher_hidden_{index}", torch.randn(batch.num_tokens, 1, generator=generator))
    weights = torch.rand(len(batch), 1, generator=generator, dtype=torch.float64)
    weights[::3] = 1.0
    batch.set_tokens("teacher_shares", batch.expand_to_tokens(torch.cat([weights, 1 - weights], 1)))


def hidden_layers() -> list[SharedValue]:
    """Two output layers, of which the second has fewer tokens; held in this process."""
    made = []
    for index, size in enumerate((_V, _V - 1)):
        weight = torch.randn(size, 1, generator=torch.Generator().manual_seed(index))
        made.append(SharedValue(OutputLayer(weight=weight)))
        hold(None, made[-1].key, OutputLayer(weight=weight))
    return made


def add_projected_teacher(batch: BatchedDataDict, generator: torch.Generator) -> None:
    """Four columns of a teacher with another vocabulary; the last has no preimage, each other has two."""
    values = _add_chunks(batch, generator)
    teacher = (values / (values.sum(-1, keepdim=True) + 0.3)).log()
    teacher[:, 3] = NEVER
    batch.set_tokens("top_ids", torch.randint(_V, (batch.num_tokens, 4, 2), generator=generator))
    weights = torch.rand(batch.num_tokens, 4, 2, generator=generator, dtype=torch.float64) / 8
    batch.set_tokens("projection_weights", weights)
    batch.set_tokens("teacher_top_logprobs", teacher)


def add_sorted_teacher(batch: BatchedDataDict, generator: torch.Generator) -> None:
    """Two tokens that both vocabularies have, and the probabilities of the others by rank."""
    values = _add_chunks(batch, generator)
    teacher = (values / (values.sum(-1, keepdim=True) + 0.3)).log()
    teacher[:, 2:] = NEVER
    own, matched = (
        torch.stack([torch.randperm(_V, generator=generator)[:4] for _ in range(batch.num_tokens)]) for _ in range(2)
    )
    batch.set_tokens("top_ids", torch.stack([matched, own], 1))
    batch.set_tokens("teacher_top_logprobs", teacher)
    batch.set_tokens("teacher_sorted", (values / 8).sort(-1, descending=True).values)
    batch.set_tokens("student_unmatched", own % 3 > 0)


def add_teacher_logprobs(batch: BatchedDataDict, generator: torch.Generator) -> None:
    """A teacher's logprob of each sampled token, inf where nothing was sampled."""
    logprobs = -2 * torch.rand(batch.num_tokens, generator=generator)
    batch.set_tokens("teacher_logprobs", logprobs.masked_fill(~batch["loss_mask"], torch.inf))


def _add_chunks(batch: BatchedDataDict, generator: torch.Generator) -> Tensor:
    """Chunks of two tokens, some tokens without one. Returns [N, 4] numbers, the same at each token of a chunk."""
    chunk = torch.div(batch.position_ids, 2, rounding_mode="floor")
    batch.set_tokens("chunk_ids", torch.where(batch.position_ids % 5 == 4, -1, chunk))
    per_chunk = torch.rand(len(batch), 8, 4, generator=generator, dtype=torch.float64)
    return per_chunk[batch.sequence_index, chunk]
