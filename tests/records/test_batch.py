"""Ragged batches: index arithmetic on flat streams."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl_core.errors import ShapeMismatch
from nemo_rl_core.records.batch import BatchedDataDict


def make(lengths):
    total = sum(lengths)
    return BatchedDataDict(
        lengths,
        {"input_ids": torch.arange(total), "pair": torch.arange(2 * total).view(total, 2)},
        {"rewards": torch.arange(float(len(lengths))), "names": [f"s{i}" for i in range(len(lengths))]},
    )


lengths_strategy = st.lists(st.integers(1, 6), min_size=1, max_size=8)


def test_positions_and_offsets_by_hand():
    batch = make([3, 1, 2])
    assert batch.offsets.tolist() == [0, 3, 4, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.sequence_index.tolist() == [0, 0, 0, 1, 2, 2]
    assert (len(batch), batch.num_tokens, batch.max_length) == (3, 6, 3)


def test_padding_only_at_the_edge():
    batch = make([3, 1])
    assert batch.padded("input_ids", pad_value=-1).tolist() == [[0, 1, 2], [3, -1, -1]]
    assert batch.padded("input_ids", pad_value=-1, side="left").tolist() == [[0, 1, 2], [-1, -1, 3]]


def test_select_reorders_and_repeats():
    batch = make([3, 1, 2]).select([2, 0, 2])
    assert batch["input_ids"].tolist() == [4, 5, 0, 1, 2, 4, 5]
    assert batch["rewards"].tolist() == [2.0, 0.0, 2.0]
    assert batch["names"] == ["s2", "s0", "s2"]


@given(lengths_strategy, st.randoms())
def test_a_permutation_and_its_inverse_is_the_identity(lengths, random):
    batch = make(lengths)
    order = list(range(len(lengths)))
    random.shuffle(order)
    back = [order.index(i) for i in range(len(order))]
    again = batch.select(order).select(back)
    assert torch.equal(again["input_ids"], batch["input_ids"])
    assert torch.equal(again["pair"], batch["pair"])
    assert again["names"] == batch["names"]


@given(lengths_strategy)
def test_split_and_concat_is_the_identity(lengths):
    batch = make(lengths)
    cut = len(lengths) // 2
    joined = BatchedDataDict.concat(list(batch.split([cut, len(lengths) - cut])))
    assert torch.equal(joined["input_ids"], batch["input_ids"])
    assert joined["names"] == batch["names"]
    assert joined.lengths.tolist() == lengths


@given(lengths_strategy)
def test_unpack_and_sums_agree(lengths):
    batch = make(lengths)
    sums = batch.sum_per_sequence(batch["input_ids"].float())
    assert sums.tolist() == [float(part.sum()) for part in batch.unpack("input_ids")]


def test_repeat_interleave_and_expand():
    batch = make([1, 2]).repeat_interleave(2)
    assert batch["names"] == ["s0", "s0", "s1", "s1"]
    assert batch.expand_to_tokens(batch["rewards"]).tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]


def test_sum_per_sequence_carries_gradient():
    batch = make([2, 1])
    values = torch.ones(3, requires_grad=True)
    (batch.sum_per_sequence(values) * torch.tensor([2.0, 5.0])).sum().backward()
    assert values.grad.tolist() == [2.0, 2.0, 5.0]


def test_a_wrong_size_is_refused_with_the_fix():
    batch = make([3, 1])
    with pytest.raises(ShapeMismatch, match=r"N=4 tokens.*expand_to_tokens"):
        batch.set_tokens("advantages", torch.zeros(2))
    with pytest.raises(ShapeMismatch, match="B=2 sequences"):
        batch.set_sequences("rewards", torch.zeros(4))


def test_a_missing_field_is_named_with_those_present():
    with pytest.raises(KeyError, match=r"no field 'advantages'.*input_ids"):
        make([1])["advantages"]


def test_batches_with_other_fields_cannot_be_joined():
    with pytest.raises(ShapeMismatch, match="input_ids"):
        BatchedDataDict.concat(
            [make([1]), BatchedDataDict([1], {"pair": torch.zeros(1, 2)}, {"rewards": torch.zeros(1), "names": [""]})]
        )


def test_an_empty_batch_is_fine():
    batch = BatchedDataDict.concat([])
    assert (len(batch), batch.num_tokens, batch.max_length) == (0, 0, 0)
    assert len(make([2, 3]).select([])) == 0
