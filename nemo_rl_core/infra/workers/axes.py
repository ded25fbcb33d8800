"""Ranks on named axes: the shard that each of them gets, and the ranks whose results count."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from attrs import frozen

__all__ = ["Dispatch", "dispatch"]


@frozen
class Dispatch:
    """How the shards of a call go to the ranks."""

    shards: tuple[int, ...]
    """By rank: the index of its shard."""
    heads: tuple[int, ...]
    """By shard: the lowest rank that has it. Its result is taken; those of its peers are equal."""


def dispatch(
    axes: Mapping[str, int], over: str | Sequence[str], *, num_ranks: int, num_shards: int, what: str = "call"
) -> Dispatch:
    """Lay the shards over some axes; ranks that differ on the other axes alone get the same one.

    Args:
        axes: Names and sizes. Ranks are numbered row by row: the last axis varies fastest.
        over: The axes that the shards go over, numbered row by row in this order.
        num_ranks: Of the group.
        num_shards: How many are given.
        what: Of the call, in messages.

    Raises:
        ValueError: The sizes do not multiply to the ranks, an axis is unknown, or there are not as many shards as
            places on `over`.
    """
    names = [over] if isinstance(over, str) else list(over)
    if (places := math.prod(axes.values())) != num_ranks:
        raise ValueError(f"{what}: the axes {dict(axes)} are of {places} ranks; there are {num_ranks}.")
    if unknown := [name for name in names if name not in axes]:
        raise ValueError(f"{what}: no axis {', '.join(unknown)} among {', '.join(axes) or 'none'}.")
    if (wanted := math.prod(axes[name] for name in names)) != num_shards:
        raise ValueError(f"{what}: {num_shards} shards for {wanted} places on {', '.join(names)} of {dict(axes)}.")
    shards = tuple(_shard(rank, axes, names) for rank in range(num_ranks))
    return Dispatch(shards, tuple(shards.index(shard) for shard in range(num_shards)))


def _shard(rank: int, axes: Mapping[str, int], over: Sequence[str]) -> int:
    places = {}
    for name, size in reversed(list(axes.items())):
        rank, places[name] = divmod(rank, size)
    index = 0
    for name in over:
        index = index * axes[name] + places[name]
    return index
