"""Data-parallel shards: every sequence once, equal counts, balanced tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.training.model.sharding import plan_step


@given(lengths=st.lists(st.integers(1, 60), max_size=40), shards=st.integers(1, 6), budget=st.integers(1, 120))
@settings(max_examples=120, deadline=None)
def test_plans(lengths, shards, budget):
    plans = plan_step(lengths, num_shards=shards, token_budget=budget)
    assert len(plans) == shards
    assert sorted(i for p in plans for i in p.indices) == list(range(len(lengths)))
    assert len({len(p.micro_batches) for p in plans}) == 1
    for plan in plans:
        assert plan.indices == sorted(plan.indices)
        assert sorted(i for m in plan.micro_batches for i in m) == list(range(len(plan.indices)))
        for m in plan.micro_batches:
            assert sum(lengths[plan.indices[i]] for i in m) <= budget or len(m) == 1
    tokens = [sum(lengths[i] for i in p.indices) for p in plans]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)
    assert plans == plan_step(torch.tensor(lengths, dtype=torch.int64), num_shards=shards, token_budget=budget)


def test_by_hand():
    # Longest first to the lightest: 8 | 7, 6 joins the 7 (13), 5 joins the 8 (13), 1 joins the first (14).
    first, second = plan_step([5, 8, 1, 7, 6], num_shards=2, token_budget=9)
    assert (first.indices, second.indices) == ([0, 1, 2], [3, 4])
    assert first.micro_batches == [[1], [0, 2]]  # positions in the shard: 8, then 5 + 1
    assert second.micro_batches == [[0], [1]]


def test_the_neediest_shard_sets_the_count():
    plans = plan_step([100, 9, 9, 9, 9, 9], num_shards=2, token_budget=10)
    assert [p.indices for p in plans] == [[0], [1, 2, 3, 4, 5]]
    assert plans[0].micro_batches == [[0], [], [], [], []]
    assert len(plans[1].micro_batches) == 5


def test_micro_batches_select_the_same_tokens_from_a_batch():
    lengths = [3, 1, 4, 2]
    batch = BatchedDataDict(lengths, {"input_ids": torch.arange(10)})
    seen = []
    for plan in plan_step(batch.lengths, num_shards=2, token_budget=4):
        shard = batch.select(plan.indices)
        for m in plan.micro_batches:
            seen += shard.select(m)["input_ids"].tolist()
    assert sorted(seen) == list(range(10))


def test_refuses_no_shards():
    with pytest.raises(ValueError, match="num_shards=0"):
        plan_step([1], num_shards=0, token_budget=4)


@pytest.mark.parametrize("num_shards", [1, 2])
def test_groups_stay_together_whatever_the_budget(num_shards):
    lengths, groups = [5, 9, 4, 4, 7, 2, 3, 8], [3, 1, 3, 0, 1, 0, 2, 2]
    plans = plan_step(lengths, num_shards=num_shards, token_budget=12, group_ids=groups)
    cuts = [[plan.indices[i] for i in cut] for plan in plans for cut in plan.micro_batches]
    assert sorted(i for cut in cuts for i in cut) == list(range(8))
    for group in set(groups):
        members = {i for i, g in enumerate(groups) if g == group}
        assert sum(bool(members & set(cut)) for cut in cuts) == 1
    assert len({len(plan.micro_batches) for plan in plans}) == 1
