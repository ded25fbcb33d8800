"""What a teacher of another vocabulary says, brought to the student's tokens.

Legend: N student's tokens, C chunks of all sequences, K ids, R preimages, U teacher's vocabulary, V student's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor

from nemo_rl_plugins_distillation.chunks import NEVER, likeliest_of_chunks, mean_of_chunks

if TYPE_CHECKING:
    from nemo_rl_core.protocols.algorithm import Model
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["ByProjection", "ByRank"]


@frozen(eq=False)
class ByProjection:
    """Fields of the loss `projected_kl`."""

    preimages: Tensor
    """[U, R] student's ids."""
    weights: Tensor
    """[U, R]"""

    def fill(self, batch: BatchedDataDict, theirs: BatchedDataDict, ids: Tensor, logprobs: Tensor, _: Model) -> None:
        """Add `top_ids` and `projection_weights` [N, K, R] and `teacher_top_logprobs` [N, K].

        Args:
            batch: The student's, with `chunk_ids` and `num_chunks`.
            theirs: The teacher's, with `chunk_ids`.
            ids: [.., K] the teacher's likeliest tokens at its own.
            logprobs: [.., K] of them.
        """
        where, of_token, sizes = _chunks(batch, theirs)
        best, mass = likeliest_of_chunks(ids[where], logprobs[where].exp(), of_token, sizes)
        inside = best < len(self.preimages)
        best = best.clamp(max=len(self.preimages) - 1)
        weights = self.weights[best] * inside[..., None]
        known = (weights.sum(-1) > 0) & (mass > 0)
        teacher = torch.where(known, mass.clamp(min=torch.finfo(mass.dtype).tiny).log(), NEVER)
        batch.set_tokens("top_ids", _to_tokens(self.preimages[best], batch))
        batch.set_tokens("projection_weights", _to_tokens(weights, batch))
        batch.set_tokens("teacher_top_logprobs", _to_tokens(teacher, batch))


@frozen(eq=False)
class ByRank:
    """Fields of the loss `sorted_probabilities`."""

    matched: tuple[Tensor, Tensor] | None
    """[U] the student's id of each of the teacher's or -1, and [V] bool of those matched; None matches none."""
    top_k: int

    def fill(
        self, batch: BatchedDataDict, theirs: BatchedDataDict, ids: Tensor, logprobs: Tensor, student: Model
    ) -> None:
        """Add `top_ids` [N, 2, K], `teacher_top_logprobs`, `teacher_sorted` and `student_unmatched` [N, K].

        Arguments as of `ByProjection.fill`; the student is asked for its own likeliest tokens.
        """
        where, of_token, sizes = _chunks(batch, theirs)
        own, _ = student.top_logprobs(batch, self.top_k)
        width = max(own.shape[1], ids.shape[1])
        best, mass = likeliest_of_chunks(ids[where], logprobs[where].exp(), of_token, sizes)
        partner = self._partner(best)
        known = (partner >= 0) & (mass > 0)
        teacher = torch.where(known, mass.clamp(min=torch.finfo(mass.dtype).tiny).log(), NEVER)
        alone = logprobs[where].exp() * (self._partner(ids[where]) < 0)
        ranked = mean_of_chunks(alone.sort(-1, descending=True).values, of_token, sizes)
        free = torch.ones_like(own, dtype=torch.bool)
        if self.matched is not None:
            has = self.matched[1]
            free = ~(has[own.clamp(max=len(has) - 1)] & (own < len(has)))
        of_teacher = _wide(_to_tokens(partner.clamp(min=0), batch), width, 0)
        batch.set_tokens("top_ids", torch.stack([of_teacher, _wide(own, width, 0)], 1))
        batch.set_tokens("teacher_top_logprobs", _wide(_to_tokens(teacher, batch), width, NEVER))
        batch.set_tokens("teacher_sorted", _wide(_to_tokens(ranked, batch), width, 0.0))
        batch.set_tokens("student_unmatched", _wide(free, width, False))

    def _partner(self, ids: Tensor) -> Tensor:
        """Return the student's id of each teacher id, in the shape [...] of `ids`; -1 for one without a partner."""
        if self.matched is None:
            return torch.full_like(ids, -1)
        of_teacher = self.matched[0]
        return of_teacher[ids.clamp(max=len(of_teacher) - 1)].masked_fill(ids >= len(of_teacher), -1)


def _chunks(batch: BatchedDataDict, theirs: BatchedDataDict) -> tuple[Tensor, Tensor, Tensor]:
    """Return which teacher tokens belong to a chunk [N], the chunk of each [K], and the sizes of all [C]."""
    starts = batch["num_chunks"].cumsum(0) - batch["num_chunks"]
    where = theirs["chunk_ids"] >= 0
    of_token = (theirs["chunk_ids"] + theirs.expand_to_tokens(starts))[where]
    return where, of_token, torch.bincount(of_token, minlength=int(batch["num_chunks"].sum()))


def _to_tokens(per_chunk: Tensor, batch: BatchedDataDict) -> Tensor:
    """[C, ...] to [N, ...]: a chunk's values at each of the student's tokens; zeros at tokens without one."""
    starts = batch["num_chunks"].cumsum(0) - batch["num_chunks"]
    ids = batch["chunk_ids"]
    where = (ids >= 0).nonzero().squeeze(1)
    out = per_chunk.new_zeros(batch.num_tokens, *per_chunk.shape[1:])
    return out.index_copy(0, where, per_chunk[(ids + batch.expand_to_tokens(starts))[where]])


def _wide(values: Tensor, width: int, fill: float) -> Tensor:
    """[N, k] to [N, width]."""
    missing = width - values.shape[1]
    return values if not missing else torch.cat([values, values.new_full((len(values), missing), fill)], 1)
