"""Packing and micro-batches against hand-worked cases, brute force and their proven bounds."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl_core.training.model.packing import (
    lightest_first,
    micro_batches_by_tokens,
    pack_first_fit_decreasing,
    pack_modified_ffd,
)

PACKERS = [pack_first_fit_decreasing, pack_modified_ffd, micro_batches_by_tokens]
LENGTHS = st.lists(st.integers(0, 60), max_size=40)


def sums(bins, lengths):
    return [sum(lengths[i] for i in b) for b in bins]


def fewest_bins(lengths, capacity):
    """Exhaustive: the true optimum, for a handful of items."""
    best = len(lengths)

    def place(i, loads):
        nonlocal best
        if len(loads) >= best:
            return
        if i == len(lengths):
            best = len(loads)
            return
        for b in range(len(loads)):
            if loads[b] + lengths[i] <= capacity:
                place(i + 1, [*loads[:b], loads[b] + lengths[i], *loads[b + 1 :]])
        place(i + 1, [*loads, lengths[i]])

    place(0, [])
    return best


def test_first_fit_decreasing_by_hand():
    # 6 opens a bin, 5 opens the next, 5 joins it (full); 4 joins the first (full); 3, 2 open the third.
    assert pack_first_fit_decreasing([4, 5, 2, 6, 3, 5], 10) == [[3, 0], [1, 5], [4, 2]]


def test_modified_ffd_beats_first_fit_where_two_short_ones_fill_a_gap():
    # First fit puts 11 beside 21 (32) and ends in a third bin; the pair 7 + 7 fills it to 35 instead.
    lengths = [21, 16, 11, 9, 7, 7]
    assert len(pack_first_fit_decreasing(lengths, 36)) == 3
    assert pack_modified_ffd(lengths, 36) == [[0, 5, 4], [1, 2, 3]]
    assert len(micro_batches_by_tokens(lengths, 36)) == 2


def test_modified_ffd_by_hand():
    # 60 (large): gap 40 takes medium 38, not 45. 55: gap 45 takes nothing medium but smalls 20 + 25.
    lengths = [60, 55, 45, 38, 25, 20, 5]
    bins = pack_modified_ffd(lengths, 100)
    assert sums(bins, lengths) == [98, 100, 50]
    assert bins == [[0, 3], [1, 2], [4, 5, 6]]


@pytest.mark.parametrize("pack", PACKERS)
def test_a_sequence_over_the_budget_goes_alone(pack):
    bins = pack([3, 50, 4, 70], 10)
    assert sorted(map(sorted, bins)) == [[0, 2], [1], [3]]


@pytest.mark.parametrize("pack", PACKERS)
def test_refuses_impossible_input(pack):
    with pytest.raises(ValueError, match="budget of 0"):
        pack([1], 0)
    with pytest.raises(ValueError, match="found -2"):
        pack([1, -2], 4)


@pytest.mark.parametrize("pack", PACKERS)
@given(lengths=LENGTHS, capacity=st.integers(1, 50))
@settings(max_examples=80, deadline=None)
def test_partition_and_budget(pack, lengths, capacity):
    bins = pack(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    for b in bins:
        assert sum(lengths[i] for i in b) <= capacity or len([i for i in b if lengths[i]]) == 1


@pytest.mark.parametrize("pack", PACKERS)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=7), capacity=st.integers(12, 24))
@settings(max_examples=80, deadline=None)
def test_within_the_proven_bound_of_the_optimum(pack, lengths, capacity):
    optimum = fewest_bins(lengths, capacity)
    assert optimum <= len(pack(lengths, capacity)) <= 11 / 9 * optimum + 6 / 9 + 1e-9


@pytest.mark.parametrize("pack", PACKERS)
@given(lengths=LENGTHS, capacity=st.integers(1, 50), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_order_of_the_input_does_not_matter(pack, lengths, capacity, seed):
    def contents(values):
        return sorted(sorted(values[i] for i in b) for b in pack(values, capacity))

    shuffled = list(lengths)
    random.Random(seed).shuffle(shuffled)
    assert contents(lengths) == contents(shuffled)
    assert pack(lengths, capacity) == pack(torch.tensor(lengths, dtype=torch.int64), capacity)


@given(lengths=LENGTHS, capacity=st.integers(1, 50), extra=st.integers(0, 5), multiple=st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_forced_counts(lengths, capacity, extra, multiple):
    need = len(micro_batches_by_tokens(lengths, capacity))
    exact = micro_batches_by_tokens(lengths, capacity, min_bins=need + extra)
    assert len(exact) == need + extra
    assert sorted(i for b in exact for i in b) == list(range(len(lengths)))
    rounded = micro_batches_by_tokens(lengths, capacity, num_bins_multiple_of=multiple)
    assert len(rounded) % multiple == 0 and need <= len(rounded) < need + multiple
    for b, total in zip(exact, sums(exact, lengths), strict=True):
        assert total <= capacity or sum(lengths[i] > 0 for i in b) == 1


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), bins=st.integers(1, 8))
@settings(max_examples=80, deadline=None)
def test_lightest_first_is_balanced(lengths, bins):
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    loads = sums(lightest_first(lengths, order, bins), lengths)
    assert max(loads) - min(loads) <= max(lengths)


def test_micro_batches_are_even_where_first_fit_is_not():
    lengths = [10] * 11
    assert sorted(sums(pack_first_fit_decreasing(lengths, 100), lengths)) == [10, 100]
    assert sums(micro_batches_by_tokens(lengths, 100), lengths) == [60, 50]


def test_a_packing_that_even_spreading_would_break_is_kept():
    # Longest-first spreading over 2 bins gives 5 + 3 + 3 = 11; first fit needs no third bin.
    lengths = [5, 5, 4, 3, 3]
    assert sums(micro_batches_by_tokens(lengths, 10), lengths) == [10, 10]


def test_fewer_sequences_than_micro_batches_leaves_empty_ones_last():
    assert micro_batches_by_tokens([3, 9], 10, min_bins=4) == [[1], [0], [], []]
    assert micro_batches_by_tokens([], 10) == [[]]
    assert micro_batches_by_tokens([], 10, min_bins=0) == []


def test_heaviest_micro_batch_first_and_positions_ascend():
    bins = micro_batches_by_tokens([1, 9, 8, 2, 7, 3, 20], 10)
    totals = sums(bins, [1, 9, 8, 2, 7, 3, 20])
    assert totals == sorted(totals, reverse=True) == [20, 10, 10, 10]
    assert all(b == sorted(b) for b in bins)


def test_thousands_of_sequences_stay_near_the_lower_bound():
    draw = random.Random(7)
    lengths = [draw.randint(50, 2048) for _ in range(5_000)]
    bins = micro_batches_by_tokens(lengths, 8192)
    assert len(bins) <= 1.01 * -(-sum(lengths) // 8192)
    totals = sums(bins, lengths)
    assert max(totals) <= 8192
