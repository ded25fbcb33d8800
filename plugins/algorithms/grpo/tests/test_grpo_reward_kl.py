"""A KL taken from the rewards, by numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from pytest import approx

from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_plugins_grpo.advantages.rloo import RLOOAdvantages
from nemo_rl_plugins_grpo.config import RewardKLConfig
from nemo_rl_plugins_grpo.reward_kl import take_kl_from_rewards

POLICY = [math.nan, -1.0, -2.0, -0.5, -1.0]
REFERENCE = [math.inf, -1.5, -2.0, 7.0, -3.0]
MASK = [False, True, True, False, True]  # KL of the sequences: 0.5 + 0 and 2


def batch_of(**fields):
    tokens = {"rollout_logprobs": POLICY, "ref_logprobs": REFERENCE, **fields}
    return BatchedDataDict(
        [3, 2],
        {"loss_mask": torch.tensor(MASK), **{name: torch.tensor(value) for name, value in tokens.items()}},
        {"rewards": torch.tensor([1.0, 3.0]), "group_ids": torch.tensor([4, 4])},
    )


def test_by_sequence():
    batch = batch_of()
    metrics = take_kl_from_rewards(batch, RewardKLConfig(beta=0.1))
    assert batch["rewards"].tolist() == approx([1 - 0.05, 3 - 0.2])
    assert metrics == approx({"reward_kl": 2.5 / 3, "reward_kl_penalty": 0.25 / 2})
    assert "token_rewards" not in batch
    assert RLOOAdvantages()(batch)[batch["loss_mask"]].tolist() == approx([-1.85, -1.85, 1.85])


def test_by_token():
    batch = batch_of()
    take_kl_from_rewards(batch, RewardKLConfig(beta=0.1, per="token"))
    assert batch["rewards"].tolist() == [1.0, 3.0]
    assert batch["token_rewards"].tolist() == approx([0.0, -0.05, 0.0, 0.0, -0.2])


@pytest.mark.parametrize(
    ("options", "kl"),
    [
        ({"type": "k2"}, (0.125, 2.0)),
        ({"type": "k3"}, (math.exp(-0.5) - 0.5, math.exp(-2) + 1)),
        ({"clamp": 1.0}, (0.5, 1.0)),
    ],
)
def test_estimators_and_their_bound(options, kl):
    batch = batch_of()
    take_kl_from_rewards(batch, RewardKLConfig(beta=1.0, **options))
    assert batch["rewards"].tolist() == approx([1 - kl[0], 3 - kl[1]])


def test_the_policy_before_the_step_goes_before_that_of_the_engine():
    batch = batch_of(logprobs=[0.0, -1.5, -1.0, 0.0, -3.0])
    take_kl_from_rewards(batch, RewardKLConfig(beta=1.0))
    assert batch["rewards"].tolist() == approx([1 - 1.0, 3.0])


def test_a_forked_rollout_pays_for_all_its_sequences():
    batch = batch_of()
    batch.set_sequences("rollout_index", torch.tensor([2, 2]))
    batch.set_sequences("rewards", torch.tensor([1.0, 1.0]))
    take_kl_from_rewards(batch, RewardKLConfig(beta=0.1))
    assert batch["rewards"].tolist() == approx([0.75, 0.75])


def test_nothing_trained():
    batch = batch_of()
    batch.set_tokens("loss_mask", torch.zeros(5, dtype=torch.bool))
    assert take_kl_from_rewards(batch, RewardKLConfig(beta=1.0)) == {"reward_kl": 0.0, "reward_kl_penalty": 0.0}
