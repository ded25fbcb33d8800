"""Bin packing of sequence lengths: pure index arithmetic, deterministic.

Every function takes lengths and returns lists of positions into them. Nothing depends on the order in
which the sequences are given, except which of two sequences of equal length is named.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["lightest_first", "micro_batches_by_tokens", "pack_first_fit_decreasing", "pack_modified_ffd"]


def pack_first_fit_decreasing(lengths: Sequence[int] | Tensor, capacity: int) -> list[list[int]]:
    """Pack by first-fit decreasing: longest first, each into the first bin with room.

    Uses at most 11/9 of the fewest possible bins, plus 6/9 (Dosa 2007). A sequence longer than
    `capacity` goes alone.

    Args:
        lengths: [B] tokens of each sequence, each >= 0.
        capacity: Tokens a bin may hold, >= 1.

    Returns:
        Non-empty bins of positions into `lengths`; every position in exactly one bin.
    """
    sizes = _checked(lengths, capacity)
    return _first_fit(sizes, _longest_first(sizes), capacity)


def pack_modified_ffd(lengths: Sequence[int] | Tensor, capacity: int) -> list[list[int]]:
    """Pack by modified first-fit decreasing: fills the bins of long sequences with well-fitting short ones.

    Source: Johnson and Garey, "A 71/60 theorem for bin packing", J. Complexity 1 (1985). Uses at most
    71/60 of the fewest possible bins, plus 1. A sequence longer than `capacity` goes alone.

    Args:
        lengths: [B] tokens of each sequence, each >= 0.
        capacity: Tokens a bin may hold, >= 1.

    Returns:
        Non-empty bins of positions into `lengths`; every position in exactly one bin.
    """
    sizes = _checked(lengths, capacity)
    order = _longest_first(sizes)
    bins = [[i] for i in order if 2 * sizes[i] > capacity]
    gaps = [capacity - sizes[b[0]] for b in bins]
    # Ascending (length, -position): the largest that fits is found by bisection from the right.
    rest = [(sizes[i], -i) for i in reversed(order) if 2 * sizes[i] <= capacity]
    small_from = bisect_left(rest, (capacity // 6 + 1,))
    medium_from = bisect_left(rest, (capacity // 3 + 1,))
    tiny, small, medium = rest[:small_from], rest[small_from:medium_from], rest[medium_from:]

    def put(where: int, item: tuple[int, int]) -> None:
        bins[where].append(-item[1])
        gaps[where] -= item[0]

    has_medium = [False] * len(bins)
    for b in range(len(bins)):  # forward, by growing gap: the largest medium item that fits
        if medium and medium[0][0] <= gaps[b]:
            put(b, medium.pop(_last_fitting(medium, gaps[b])))
            has_medium[b] = True
    for b in range(len(bins) - 1, -1, -1):  # backward: the smallest small item and the largest beside it
        if not has_medium[b] and len(small) >= 2 and small[0][0] + small[1][0] <= gaps[b]:
            put(b, small.pop(0))
            put(b, small.pop(_last_fitting(small, gaps[b])))
    remaining = tiny + small + medium
    for b in range(len(bins)):  # forward: whatever fits, largest first
        while remaining and remaining[0][0] <= gaps[b]:
            put(b, remaining.pop(_last_fitting(remaining, gaps[b])))
    return bins + _first_fit(sizes, [-item[1] for item in reversed(remaining)], capacity)


def micro_batches_by_tokens(
    lengths: Sequence[int] | Tensor, budget: int, *, num_bins_multiple_of: int = 1, min_bins: int = 1
) -> list[list[int]]:
    """Cut sequences into as few micro-batches under a token budget as the packings find, then balance them.

    A sequence longer than `budget` goes alone. The heaviest micro-batch comes first, so that a budget that
    does not fit into memory fails at once.

    Args:
        lengths: [B] tokens of each sequence, each >= 0.
        budget: Tokens of one micro-batch, >= 1.
        num_bins_multiple_of: Round the number of micro-batches up to a multiple of this.
        min_bins: At least so many micro-batches; a value that is enough for `lengths` is the exact
            count. Ranks that must take equally many agree by passing the largest of their needs.

    Returns:
        Micro-batches of ascending positions into `lengths`; each position in exactly one. Some are empty
        if there are fewer sequences than micro-batches.
    """
    if num_bins_multiple_of < 1 or min_bins < 0:
        raise ValueError(f"num_bins_multiple_of={num_bins_multiple_of} must be >= 1, min_bins={min_bins} >= 0.")
    sizes = _checked(lengths, budget)
    order = _longest_first(sizes)
    # An oversized sequence costs a whole micro-batch, as one of exactly the budget does.
    capped = [min(size, budget) for size in sizes]
    fewest = -(-sum(capped) // budget)
    packed = _first_fit(capped, order, budget)
    if len(packed) > fewest:
        packed = min(packed, pack_modified_ffd(capped, budget), key=len)
    wanted = max(len(packed), min_bins)
    wanted = -(-wanted // num_bins_multiple_of) * num_bins_multiple_of
    spread = lightest_first(capped, order, wanted)
    if any(sum(capped[i] for i in b) > budget for b in spread):
        spread = _leveled(capped, packed + [[] for _ in range(wanted - len(packed))], budget)
    for b in spread:
        b.sort()
    return sorted(spread, key=lambda b: (-sum(sizes[i] for i in b), b[:1] or [len(sizes)]))


def lightest_first(lengths: Sequence[int], order: Iterable[int], num_bins: int) -> list[list[int]]:
    """Give each sequence, in `order`, to the bin that holds the fewest tokens (Graham's list scheduling).

    With `order` longest first, the heaviest bin is at most 4/3 of the best possible one, and two bins
    differ by at most the longest sequence. Zero-length sequences are spread too.

    Returns:
        `num_bins` bins of positions into `lengths`; some are empty if there are fewer sequences.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, 0, b) for b in range(num_bins)]
    for i in order:
        tokens, count, b = heap[0]
        bins[b].append(i)
        heapq.heapreplace(heap, (tokens + lengths[i], count + 1, b))
    return bins


def _checked(lengths: Sequence[int] | Tensor, capacity: int) -> list[int]:
    """Return `lengths` [B], in tokens, as a list; refuse negative ones and a capacity below 1."""
    sizes = [int(x) for x in (lengths.tolist() if hasattr(lengths, "tolist") else lengths)]
    if capacity < 1:
        raise ValueError(f"A token budget of {capacity} holds nothing; it must be >= 1.")
    if sizes and min(sizes) < 0:
        raise ValueError(f"Lengths must be >= 0, found {min(sizes)}.")
    return sizes


def _longest_first(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))


def _last_fitting(items: list[tuple[int, int]], gap: int) -> int:
    """Index of the largest of the ascending `items` that fits into `gap` (one does)."""
    return bisect_left(items, (gap + 1,)) - 1


def _first_fit(sizes: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    """First fit over a tournament tree of free space: O(log bins) a sequence."""
    bins = [[i] for i in order if sizes[i] > capacity]
    rest = [i for i in order if sizes[i] <= capacity]
    # Any two of first fit's bins hold more than `capacity` together, so no more than these can open.
    width = 1 << min(len(rest), 2 * sum(sizes[i] for i in rest) // capacity + 2).bit_length()
    free = [capacity] * (2 * width)  # free[1] is the root; the leaf of bin b is free[width + b]
    opened: list[list[int]] = [[] for _ in range(width)]
    for i in rest:
        size = sizes[i]
        node = 1
        while node < width:
            node *= 2
            if free[node] < size:
                node += 1
        opened[node - width].append(i)
        free[node] -= size
        node //= 2
        while node:
            left, right = free[2 * node], free[2 * node + 1]
            best = left if left > right else right
            if free[node] == best:
                break
            free[node] = best
            node //= 2
    return bins + [b for b in opened if b]


def _leveled(sizes: Sequence[int], bins: list[list[int]], budget: int) -> list[list[int]]:
    """Even out a packing that is already within the budget: move from the heaviest to the lightest bin."""
    loads = [sum(sizes[i] for i in b) for b in bins]
    for _ in range(min(4 * len(bins), 200_000 // len(bins))):  # with thousands of full bins it changes little
        heavy = max(range(len(bins)), key=lambda b: (loads[b], -b))
        light = min(range(len(bins)), key=lambda b: (loads[b], b))
        room = (loads[heavy] - loads[light]) // 2
        movable = [i for i in bins[heavy] if 0 < sizes[i] <= room]
        if not movable or len(bins[heavy]) < 2:
            break
        moved = max(movable, key=lambda i: (sizes[i], -i))
        bins[heavy].remove(moved)
        bins[light].append(moved)
        loads[heavy] -= sizes[moved]
        loads[light] += sizes[moved]
    assert max(loads, default=0) <= budget, "levelling only moves towards the lighter bin"
    return bins
