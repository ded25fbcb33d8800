"""Which sequences of a batch are one rollout, and which rollouts one group.

Legend: B sequences, R rollouts, G groups. A rollout is one sequence, unless a template that rewrote
history forked it; its reward then stands at each of its sequences and must count once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["Grouping", "group_rollouts"]


@frozen(eq=False)
class Grouping:
    """The nesting of sequences in rollouts in groups."""

    rollout_of: Tensor
    """[B] int64, the rollout of each sequence."""
    group_of: Tensor
    """[R] int64, the group of each rollout."""
    num_groups: int

    @property
    def num_rollouts(self) -> int:
        """R."""
        return int(self.group_of.numel())

    def per_rollout(self, per_sequence: Tensor) -> Tensor:
        """[B] to [R], for a value that is the same at every sequence of a rollout."""
        return per_sequence.new_zeros(self.num_rollouts).scatter(0, self.rollout_of, per_sequence)

    def sum_per_rollout(self, per_sequence: Tensor) -> Tensor:
        """[B] to [R], for a value that adds up over the sequences of a rollout, such as a count."""
        return per_sequence.new_zeros(self.num_rollouts).index_add(0, self.rollout_of, per_sequence)

    def sum_per_group(self, per_rollout: Tensor) -> Tensor:
        """[R] to [G]."""
        return per_rollout.new_zeros(self.num_groups).index_add(0, self.group_of, per_rollout)

    def range_per_group(self, per_rollout: Tensor) -> Tensor:
        """[R] to [G]: largest minus smallest value."""
        empty = per_rollout.new_zeros(self.num_groups)
        high = empty.scatter_reduce(0, self.group_of, per_rollout, "amax", include_self=False)
        low = empty.scatter_reduce(0, self.group_of, per_rollout, "amin", include_self=False)
        return high - low


def group_rollouts(batch: BatchedDataDict) -> Grouping:
    """The grouping of a batch by `group_ids` [B] and, if present, `rollout_index` [B]."""
    groups, group_of_sequence = torch.unique(batch["group_ids"], return_inverse=True)
    num_groups = int(groups.numel())
    if "rollout_index" not in batch:
        every = torch.arange(len(batch), device=groups.device)
        return Grouping(every, group_of_sequence, num_groups)
    index = torch.as_tensor(batch["rollout_index"], dtype=torch.int64, device=groups.device)
    # One number for each (group, index): far faster to make unique than pairs.
    stride = int(index.max()) + 1 if len(batch) else 1
    rollouts, rollout_of = torch.unique(group_of_sequence * stride + index, return_inverse=True)
    return Grouping(rollout_of, rollouts.div(stride, rounding_mode="floor"), num_groups)
