"""RLOO, REINFORCE++, GDPO, raw and best-of-k advantages, by numbers worked by hand."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from pytest import approx

from nemo_rl_core.errors import DataError
from nemo_rl_core.protocols.advantage import AdvantageEstimator
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_plugins_grpo.advantages.gdpo import GDPOAdvantages
from nemo_rl_plugins_grpo.advantages.pass_at_k import PassAtKAdvantages, best_of_k_advantages
from nemo_rl_plugins_grpo.advantages.raw import RawAdvantages
from nemo_rl_plugins_grpo.advantages.reinforce_pp import ReinforcePPAdvantages
from nemo_rl_plugins_grpo.advantages.rloo import RLOOAdvantages

ESTIMATORS = [RLOOAdvantages, ReinforcePPAdvantages, GDPOAdvantages, RawAdvantages, PassAtKAdvantages]


def batch_of(rewards, groups=None, *, lengths=None, token_rewards=None, **named):
    """A token that is not trained, and then `lengths` (one by default) that are, for each reward."""
    lengths = lengths or [1] * len(rewards)
    mask = torch.cat([torch.tensor([False] + [True] * n) for n in lengths]) if lengths else torch.zeros(0).bool()
    batch = BatchedDataDict(
        [n + 1 for n in lengths],
        {"loss_mask": mask},
        {
            "rewards": torch.tensor(rewards, dtype=torch.float32),
            "group_ids": torch.tensor(groups or [0] * len(rewards), dtype=torch.int64),
            **{f"reward/{name}": torch.tensor(values, dtype=torch.float32) for name, values in named.items()},
        },
    )
    if token_rewards is not None:
        batch.set_tokens("token_rewards", torch.tensor(token_rewards))
    return batch


def advantages(estimator, batch, **options):
    """Those of the trained tokens; the others are 0."""
    found = estimator(estimator.config_class(**options))(batch)
    assert not found[~batch["loss_mask"]].any()
    return found[batch["loss_mask"]].tolist()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_they_are_estimators(estimator):
    assert isinstance(estimator(), AdvantageEstimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_empty_batch(estimator):
    assert estimator()(batch_of([])).numel() == 0


# -- RLOO ----------------------------------------------------------------------------------------------------------


def test_rloo():
    assert advantages(RLOOAdvantages, batch_of([3, 0, 0, 5], [1, 1, 1, 2])) == approx([3.0, -1.5, -1.5, 0.0])


def test_rloo_whitened():
    # of 3, -1.5, -1.5 the mean is 0 and the deviation sqrt((9 + 2.25 + 2.25) / 2) = 2.598
    got = advantages(RLOOAdvantages, batch_of([3, 0, 0]), whiten=True, epsilon=1e-9)
    assert got == approx([3 / math.sqrt(6.75), *[-1.5 / math.sqrt(6.75)] * 2])


# -- REINFORCE++ ---------------------------------------------------------------------------------------------------


def test_reinforce_pp_whitens_over_tokens():
    # returns of the four trained tokens 1, 0, 0, 0: mean 0.25, deviation 0.5
    got = advantages(ReinforcePPAdvantages, batch_of([1, 0], [1, 2], lengths=[1, 3]))
    assert got == approx([1.5, -0.5, -0.5, -0.5])


def test_reinforce_pp_with_the_baseline_of_the_group():
    batch = batch_of([3, 1, 9, 9], [1, 1, 2, 2])
    assert advantages(ReinforcePPAdvantages, batch, group_baseline=True, whiten=False) == approx([1, -1, 0, 0])
    # deviation of 1, -1, 0, 0: sqrt(2 / 3)
    whitened = advantages(ReinforcePPAdvantages, batch, group_baseline=True)
    assert whitened == approx([math.sqrt(1.5), -math.sqrt(1.5), 0, 0])


@pytest.mark.parametrize("estimator", [ReinforcePPAdvantages, RawAdvantages])
def test_rewards_by_token_count_for_the_tokens_before_them(estimator):
    # trained tokens: rewards -1 and -2 after a reward of 5 -> 5 - 3 and 5 - 2; the other sequence 1 - 4
    batch = batch_of([5, 1], lengths=[2, 1], token_rewards=[9.0, -1.0, -2.0, math.nan, -4.0])
    assert advantages(estimator, batch, whiten=False) == approx([2.0, 3.0, -3.0])


@pytest.mark.parametrize("estimator", [ReinforcePPAdvantages, RawAdvantages])
@pytest.mark.parametrize("rewards", [[0.1] * 3, [1e6 / 3] * 4, [2.0]])
def test_a_batch_that_does_not_vary_is_zero(estimator, rewards):
    assert advantages(estimator, batch_of(rewards), whiten=True) == [0.0] * len(rewards)


@pytest.mark.parametrize("estimator", [ReinforcePPAdvantages, RawAdvantages, RLOOAdvantages])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused(estimator, bad):
    with pytest.raises(DataError, match="sequence 1"):
        advantages(estimator, batch_of([0.0, bad]), whiten=True)


def test_raw():
    assert advantages(RawAdvantages, batch_of([3, -1], [1, 2], lengths=[2, 1])) == [3.0, 3.0, -1.0]


# -- GDPO ----------------------------------------------------------------------------------------------------------

H = math.sqrt(0.5)  # a pair that differs has advantages of +-0.707


def test_gdpo_hears_a_reward_that_varies_little():
    """Added first, right answers in a bad form (1.0) and wrong ones in a good form (0.1) differ by 0.9."""
    batch = batch_of([0, 0], right=[1.0, 0.0], form=[0.0, 0.1])
    assert advantages(GDPOAdvantages, batch, whiten=False) == approx([0.0, 0.0], abs=1e-4)


def test_gdpo_adds_by_weight_and_whitens():
    batch = batch_of([0, 0, 0, 0], [1, 1, 2, 2], right=[1.0, 0.0, 1.0, 1.0], form=[0.0, 0.1, 0.0, 0.1])
    plain = advantages(GDPOAdvantages, batch, whiten=False, weights={"right": 2.0, "form": 1.0})
    assert plain == approx([2 * H - H, -H, -H, H], abs=1e-4)
    whitened = advantages(GDPOAdvantages, batch, weights={"right": 2.0, "form": 1.0})
    std = statistics.stdev([H, -H, -H, H])
    assert whitened == approx([H / std, -H / std, -H / std, H / std], abs=1e-4)
    assert advantages(GDPOAdvantages, batch, whiten=False, weights={"form": 1.0}) == approx([-H, H, -H, H], abs=1e-4)


@pytest.mark.parametrize(
    ("named", "options", "says"),
    [
        ({}, {}, "found the rewards"),
        ({"right": [1.0, 0.0]}, {"weights": {"rigth": 1.0}}, "rigth"),
        ({"right": [1.0, math.nan]}, {}, "reward/right"),
    ],
)
def test_gdpo_says_which_reward_is_missing(named, options, says):
    with pytest.raises(DataError, match=says):
        advantages(GDPOAdvantages, batch_of([0, 0], **named), **options)


# -- best of k -----------------------------------------------------------------------------------------------------


def test_pass_at_2_by_hand():
    # The success: best of 2 with it 1, without it 0. A failure: with it (1 + 0) / 2, without it 1.
    assert advantages(PassAtKAdvantages, batch_of([1, 0, 0]), k=2) == approx([1.0, -0.5, -0.5])


def test_many_successes_are_worth_little_each():
    # 3 of 4: every pair has a success, so that no rollout matters but for the pair of one failure
    assert advantages(PassAtKAdvantages, batch_of([1, 1, 1, 0]), k=2) == approx([0.0] * 4)


@pytest.mark.parametrize("rewards", [[0.3, -1.0, 2.0, 0.5, 0.5], [1.0, 0.0], [4.0, 4.0, 1.0, 0.0, 9.0, 2.0, 2.0]])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_best_of_k_is_the_mean_over_subsets(rewards, k):
    n, size = len(rewards), min(k, len(rewards) - 1)
    expected = []
    for i in range(n):
        subsets = list(itertools.combinations(range(n), size))
        with_it = statistics.fmean(max(rewards[j] for j in s) for s in subsets if i in s)
        expected.append(with_it - statistics.fmean(max(rewards[j] for j in s) for s in subsets if i not in s))
    assert best_of_k_advantages(torch.tensor(rewards, dtype=torch.float64), k).tolist() == approx(expected)


def test_best_of_one_is_rloo():
    batch = batch_of([3, 0, 1, 5, 2], [1, 1, 1, 2, 2])
    assert advantages(PassAtKAdvantages, batch, k=1) == approx(advantages(RLOOAdvantages, batch))


def test_the_best_of_many_in_a_large_group_stays_finite():
    rewards = torch.linspace(0, 1, 1024, dtype=torch.float64)
    found = best_of_k_advantages(rewards, 64)
    assert torch.isfinite(found).all()
    assert found[-1] > 0
    assert found.argmax() == 1023


@pytest.mark.parametrize("rewards", [[4.0], [0.1] * 3])
def test_best_of_k_without_signal(rewards):
    assert advantages(PassAtKAdvantages, batch_of(rewards)) == [0.0] * len(rewards)
