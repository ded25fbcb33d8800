"""Cutting a batch of rollouts into optimizer steps without cutting a group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

__all__ = ["split_by_groups"]


def split_by_groups(group_ids: Tensor, num_parts: int) -> list[Sequence[int]]:
    """Sequence indices of each part; groups in the order of their first sequence, sizes within one group.

    Args:
        group_ids: [B] int64.
        num_parts: Parts wanted; fewer come back when there are fewer groups.

    Returns:
        Lists that together hold each index of the batch once.
    """
    members: dict[int, list[int]] = {}
    for index, group in enumerate(group_ids.tolist()):
        members.setdefault(group, []).append(index)
    groups = list(members.values())
    num_parts = min(num_parts, len(groups))
    bounds = [len(groups) * part // num_parts for part in range(num_parts + 1)] if num_parts else []
    return [[index for group in groups[start:end] for index in group] for start, end in pairwise(bounds)]
