"""Group-relative advantages, by numbers worked by hand."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from nemo_rl_core.protocols.advantage import AdvantageEstimator
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_plugins_grpo.advantage_config import GroupRelativeConfig
from nemo_rl_plugins_grpo.advantages.grpo import GroupRelativeAdvantages, group_relative_advantages
from nemo_rl_plugins_grpo.grouping import Grouping


def batch_of(rewards, groups, **sequences):
    """Two tokens a rollout, of which the second is trained."""
    n = len(rewards)
    return BatchedDataDict(
        [2] * n,
        {"loss_mask": torch.tensor([False, True] * n, dtype=torch.bool)},
        {
            "rewards": torch.tensor(rewards, dtype=torch.float32),
            "group_ids": torch.tensor(groups, dtype=torch.int64),
            **sequences,
        },
    )


def advantages(rewards, groups, *, batch=None, **options):
    """One advantage a sequence, taken from its trained token."""
    batch = batch or batch_of(rewards, groups)
    return GroupRelativeAdvantages(GroupRelativeConfig(**options))(batch)[batch["loss_mask"]].tolist()


def reference(rewards, groups, *, normalize, leave_one_out, epsilon=1e-6):
    """The formula, one rollout at a time."""
    out = []
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        members = [r for j, (r, g) in enumerate(zip(rewards, groups, strict=True)) if g == group and j != i]
        if not members or set(members) == {reward}:
            out.append(0.0)
            continue
        if not leave_one_out:
            members.append(reward)
        advantage = reward - statistics.fmean(members)
        std = statistics.stdev(members) if len(members) > 1 else 0.0
        out.append(advantage / (std + epsilon) if normalize and std > 0 else advantage)
    return out


def test_it_is_an_estimator():
    assert isinstance(GroupRelativeAdvantages(), AdvantageEstimator)


def test_a_group_by_hand():
    # mean 0.25, deviations 0.75 and -0.25, std sqrt(0.75 / 3) = 0.5
    got = advantages([1, 0, 0, 0], [7, 7, 7, 7], leave_one_out=False)
    assert got == approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)


def test_leave_one_out_by_hand():
    # The others of the first are all 0: baseline 0, no deviation, not divided. Those of the rest are
    # (1, 0, 0): baseline 1/3, std sqrt((4 + 1 + 1) / 9 / 2) = 1 / sqrt(3).
    got = advantages([1, 0, 0, 0], [7, 7, 7, 7])
    assert got == approx([1.0, *[-1 / math.sqrt(3)] * 3], rel=1e-5)


def test_without_normalisation():
    assert advantages([3, 0, 0], [1, 1, 1], normalize=False) == approx([3.0, -1.5, -1.5])
    assert advantages([3, 0, 0], [1, 1, 1], normalize=False, leave_one_out=False) == approx([2.0, -1.0, -1.0])


def test_leave_one_out_in_a_pair_is_the_plain_difference():
    assert advantages([5, 2], [1, 1]) == [3.0, -3.0]


@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize("rewards", [[4.0], [0.1] * 3, [0.1] * 7, [-1e6 / 3] * 16])
def test_no_signal_is_exactly_zero(rewards, leave_one_out):
    assert advantages(rewards, [3] * len(rewards), leave_one_out=leave_one_out) == [0.0] * len(rewards)


@pytest.mark.parametrize(("size", "own", "others"), [(3, 0.81, 0.55), (6, 0.5, 0.28), (15, 1.0, 0.04)])
def test_others_that_agree_are_not_divided_by_rounding(size, own, others):
    """A variance that is only rounding, 1e-17, would make these advantages 2e5 to 1e6."""
    got = advantages([own, *[others] * (size - 1)], [1] * size)
    assert got[0] == approx(own - others, rel=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_equal_rewards_whose_mean_is_rounded_are_exactly_zero(normalize):
    rewards = torch.full((3,), 0.1, dtype=torch.float64)  # 0.1 + 0.1 + 0.1 = 0.30000000000000004
    grouping = Grouping(torch.arange(3), torch.zeros(3, dtype=torch.int64), 1)
    got = group_relative_advantages(rewards, grouping, normalize=normalize, leave_one_out=True, epsilon=1e-6)
    assert got.tolist() == [0.0, 0.0, 0.0]


def test_small_differences_on_a_large_offset_survive():
    exact = reference([10000.0, 10001.0, 10003.0], [1] * 3, normalize=True, leave_one_out=True)
    assert advantages([10000.0, 10001.0, 10003.0], [1] * 3) == approx(exact, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 3)), min_size=1, max_size=24),
    st.booleans(),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_unequal_groups_in_any_order(rows, normalize, leave_one_out, random):
    rewards = [float(r) / 2 for r, _ in rows]
    groups = [g * 1_000_003 - 5 for _, g in rows]
    options = {"normalize": normalize, "leave_one_out": leave_one_out}
    got = advantages(rewards, groups, **options)
    assert got == approx(reference(rewards, groups, **options), rel=1e-5, abs=1e-6)
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = advantages([rewards[i] for i in order], [groups[i] for i in order], **options)
    assert shuffled == approx([got[i] for i in order], rel=1e-6, abs=1e-7)


def test_groups_do_not_mix():
    alone = advantages([1, 0, 0.5], [1, 1, 1])
    together = advantages([1, 90, 0, 70, 0.5], [1, 2, 1, 2, 1])
    assert [together[i] for i in (0, 2, 4)] == approx(alone)


def test_untrained_tokens_have_none():
    batch = batch_of([1, 0], [1, 1])
    got = GroupRelativeAdvantages()(batch)
    assert got.dtype == torch.float32
    assert got.tolist() == [0.0, 1.0, 0.0, -1.0]


def test_a_forked_rollout_counts_once():
    """Three rollouts; the second was forked into two sequences that both carry its reward."""
    plain = advantages([1, 0, 0.5], [4, 4, 4])
    forked = batch_of([1, 0, 0, 0.5], [4] * 4, rollout_index=torch.tensor([0, 1, 1, 2]))
    got = advantages(None, None, batch=forked)
    assert got == approx([plain[0], plain[1], plain[1], plain[2]])


def test_equal_indices_in_other_groups_are_other_rollouts():
    batch = batch_of([1, 0, 5, 3], [4, 4, 9, 9], rollout_index=torch.tensor([0, 1, 0, 1]))
    assert advantages(None, None, batch=batch) == approx([1.0, -1.0, 2.0, -2.0])


def test_an_empty_batch():
    assert GroupRelativeAdvantages()(batch_of([], [])).numel() == 0
