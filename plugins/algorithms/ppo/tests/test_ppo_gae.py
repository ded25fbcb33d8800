"""Generalised advantages by hand, against a plain double loop, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from pytest import approx

from nemo_rl_core.errors import ConfigError, DataError
from nemo_rl_core.models.numerics.whitening import whiten
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_plugins_ppo.config import GAEConfig
from nemo_rl_plugins_ppo.gae import GeneralizedAdvantages


def one(values, mask, reward, **fields):
    """A batch of one sequence."""
    batch = BatchedDataDict(
        [len(mask)],
        {"loss_mask": torch.tensor(mask, dtype=torch.bool), "values": torch.tensor(values, dtype=torch.float64)},
        {"rewards": torch.tensor([reward])},
    )
    for name, value in fields.items():
        (batch.set_tokens if len(value) == len(mask) and name.startswith("token") else batch.set_sequences)(
            name, torch.tensor(value)
        )
    return batch


def estimate(batch, **options):
    return GeneralizedAdvantages(GAEConfig(**{"whiten": False, **options}))


def test_by_hand():
    """gamma 0.5, lambda 0.5, a prompt of one token, three sampled tokens, reward 1 at the last.

    delta_3 = 1 - 0.6 = 0.4;               A_3 = 0.4
    delta_2 = 0 + 0.5 * 0.6 - 0.2 = 0.1;   A_2 = 0.1 + 0.25 * 0.4 = 0.2
    delta_1 = 0 + 0.5 * 0.2 - 0.4 = -0.3;  A_1 = -0.3 + 0.25 * 0.2 = -0.25
    """
    batch = one([9.0, 0.4, 0.2, 0.6], [0, 1, 1, 1], 1.0)
    gae = estimate(batch, gamma=0.5, gae_lambda=0.5)
    assert gae(batch).tolist() == approx([0.0, -0.25, 0.2, 0.4])
    assert gae.returns(batch).tolist() == approx([0.0, 0.15, 0.4, 1.0])


def test_tokens_that_were_not_sampled_are_skipped():
    """An environment's answer between two sampled tokens is part of the transition, whatever stands at its tokens."""
    plain = one([9.0, 0.4, 0.2, 0.6], [0, 1, 1, 1], 1.0)
    two_turns = one([9.0, 0.4, math.nan, 5.0, 0.2, 0.6, math.inf], [0, 1, 0, 0, 1, 1, 0], 1.0)
    options = {"gamma": 0.5, "gae_lambda": 0.5}
    assert estimate(plain, **options)(plain)[1:].tolist() == approx(
        estimate(two_turns, **options)(two_turns)[[1, 4, 5]].tolist()
    )
    assert estimate(two_turns, **options)(two_turns)[[0, 2, 3, 6]].tolist() == [0, 0, 0, 0]


def test_lambda_one_without_discount_is_the_reward_minus_the_value():
    batch = one([0.0, 0.4, 0.2, 0.6], [0, 1, 1, 1], 2.0)
    gae = estimate(batch, gae_lambda=1.0)
    assert gae(batch).tolist() == approx([0.0, 1.6, 1.8, 1.4])
    assert gae.returns(batch).tolist() == approx([0.0, 2.0, 2.0, 2.0])


def test_rewards_of_tokens_are_added_to_the_one_at_the_end():
    """lambda 1, gamma 1: the return of a token is what is earned from it on."""
    batch = one([0.0, 0.0, 0.0, 0.0], [0, 1, 0, 1], 1.0, token_rewards=[7.0, -0.5, 7.0, -0.25])
    assert estimate(batch, gae_lambda=1.0)(batch).tolist() == approx([0.0, 0.25, 0.0, 0.75])


def test_policy_and_critic_may_have_their_own_lambda():
    """VAPO: the critic's returns are those of lambda 1, the policy's advantages those of its own lambda."""
    batch = one([0.0, 0.4, 0.2, 0.6], [0, 1, 1, 1], 1.0)
    both = estimate(batch, gae_lambda=0.5, critic_lambda=1.0)
    assert both.returns(batch).tolist() == approx([0.0, 1.0, 1.0, 1.0])
    assert both(batch).tolist() == estimate(batch, gae_lambda=0.5)(batch).tolist()
    assert estimate(batch, policy_lambda=0.5)(batch).tolist() == both(batch).tolist()


def test_lambda_by_length():
    """lambda = 1 - 1 / (alpha * l): alpha 0.5 and 4 tokens give 0.5; 2 tokens (and fewer) give 0."""
    long = one([0.0, 0.4, 0.2, 0.6, 0.1], [0, 1, 1, 1, 1], 1.0)
    adaptive = estimate(long, length_adaptive_alpha=0.5)
    assert adaptive(long).tolist() == approx(estimate(long, gae_lambda=0.5)(long).tolist())
    short = one([0.0, 0.4], [0, 1], 1.0)
    assert estimate(short, length_adaptive_alpha=0.5)(short).tolist() == approx([0.0, 0.6])
    short = one([0.0, 0.4, 0.2], [0, 1, 1], 1.0)
    assert adaptive(short).tolist() == approx(estimate(short, gae_lambda=0.0)(short).tolist())


@pytest.mark.parametrize(("truncated", "last"), [(True, 1.0 + 0.5 * 0.8 - 0.6), (False, 1.0 - 0.6)])
def test_a_truncated_episode_goes_on_in_the_value_of_its_last_state(truncated, last):
    batch = one([0.0, 0.2, 0.6], [0, 1, 1], 1.0, truncated=[truncated], final_values=[0.8])
    assert estimate(batch, gamma=0.5, bootstrap_truncated=True)(batch)[-1].item() == approx(last)
    assert estimate(batch, gamma=0.5)(batch)[-1].item() == approx(0.4)


def random_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = [5, 1, 9, 4, 12]
    batch = BatchedDataDict(lengths)
    n = batch.num_tokens
    batch.set_tokens("loss_mask", (torch.rand(n, generator=generator) > 0.4) & (batch.position_ids > 0))
    batch["loss_mask"][batch.sequence_index == 3] = False
    batch.set_tokens("values", torch.randn(n, generator=generator, dtype=torch.float64))
    batch.set_tokens("token_rewards", torch.randn(n, generator=generator, dtype=torch.float64))
    batch.set_sequences("rewards", torch.randn(5, generator=generator))
    batch.set_sequences("final_values", torch.randn(5, generator=generator))
    batch.set_sequences("truncated", torch.tensor([True, False, True, True, False]))
    return batch


@pytest.mark.parametrize("seed", range(3))
def test_against_a_double_loop(seed):
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, written out for each token."""
    batch, gamma, gae_lambda = random_batch(seed), 0.9, 0.8
    options = {"gamma": gamma, "gae_lambda": gae_lambda, "bootstrap_truncated": True}
    found = estimate(batch, **options)(batch).tolist()
    returns = estimate(batch, **options).returns(batch).tolist()
    start = 0
    for row, length in enumerate(batch.lengths.tolist()):
        steps = [t for t in range(start, start + length) if batch["loss_mask"][t]]
        for place, t in enumerate(steps):
            expected = 0.0
            for ahead, u in enumerate(steps[place:]):
                is_last = u == steps[-1]
                reward = float(batch["token_rewards"][u]) + (float(batch["rewards"][row]) if is_last else 0.0)
                after = float(batch["final_values"][row]) * bool(batch["truncated"][row])
                following = after if is_last else float(batch["values"][steps[place + ahead + 1]])
                expected += (gamma * gae_lambda) ** ahead * (reward + gamma * following - float(batch["values"][u]))
            assert found[t] == approx(expected, rel=1e-5, abs=1e-6)
            assert returns[t] == approx(expected + float(batch["values"][t]), rel=1e-5, abs=1e-6)
        for t in set(range(start, start + length)) - set(steps):
            assert found[t] == returns[t] == 0.0
        start += length


def test_whitening():
    mask = torch.tensor([True, True, False, True])
    found = whiten(torch.tensor([1.0, 2.0, 50.0, 6.0], dtype=torch.float64), mask)
    std = math.sqrt((4 + 1 + 9) / 2)  # mean 3, Bessel's factor
    assert found.tolist() == approx([-2 / std, -1 / std, 0.0, 3 / std], rel=1e-6)
    kept = whiten(torch.tensor([1.0, 2.0, 50.0, 6.0], dtype=torch.float64), mask, shift_mean=False)
    assert kept.tolist() == approx([1 / std, 2 / std, 0.0, 6 / std], rel=1e-6)


@pytest.mark.parametrize("same", [0.0, 0.1, 1000.1])
def test_whitening_what_does_not_vary(same):
    mask = torch.ones(7, dtype=torch.bool)
    assert whiten(torch.full((7,), same), mask).tolist() == [0.0] * 7
    assert whiten(torch.full((7,), same), mask, shift_mean=False).tolist() == approx([same] * 7)
    assert whiten(torch.ones(2), torch.zeros(2, dtype=torch.bool)).tolist() == [0.0, 0.0]


def test_whitened_advantages_leave_the_returns_alone():
    batch = random_batch()
    whitened = GeneralizedAdvantages(GAEConfig(whiten=True))
    chosen = whitened(batch)[batch["loss_mask"]]
    assert float(chosen.mean()) == approx(0.0, abs=1e-6)
    assert float(chosen.std()) == approx(1.0, rel=1e-5)
    assert torch.equal(whitened.returns(batch), estimate(batch).returns(batch))


def test_whitened_rewards_are_divided_by_their_deviation():
    """Rewards (0, 4): the deviation is sqrt(8), the mean of 2 stays: (0, sqrt 2)."""
    batch = one([0.0, 0.0, 0.0], [0, 1, 1], 4.0)
    found = estimate(batch, gae_lambda=0.0, whiten_rewards=True)(batch)
    assert found.tolist() == approx([0.0, 0.0, math.sqrt(2)], rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(DataError, match=r"reward is not finite .* sequences \[0\]"):
        batch = one([0.0, 0.1], [0, 1], bad)
        estimate(batch)(batch)
    with pytest.raises(DataError, match=r"value is not finite"):
        batch = one([0.0, bad], [0, 1], 1.0)
        estimate(batch).returns(batch)


def test_without_a_critic_it_says_what_is_missing():
    batch = BatchedDataDict([2], {"loss_mask": torch.tensor([False, True])}, {"rewards": torch.ones(1)})
    with pytest.raises(ConfigError, match=r"`gae` need values in the batch"):
        estimate(batch)(batch)
    batch.set_tokens("values", torch.zeros(2))
    with pytest.raises(ConfigError, match=r"need final_values, truncated"):
        estimate(batch, bootstrap_truncated=True)(batch)


def test_an_empty_batch_and_one_without_trained_tokens():
    empty = BatchedDataDict([], {"loss_mask": torch.zeros(0, dtype=torch.bool), "values": torch.zeros(0)})
    empty.set_sequences("rewards", torch.zeros(0))
    assert estimate(empty)(empty).shape == (0,)
    untrained = one([0.0, 0.3], [0, 0], 1.0)
    assert GeneralizedAdvantages()(untrained).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 1.5},
        {"gae_lambda": -0.1},
        {"length_adaptive_alpha": 0.0},
        {"length_adaptive_alpha": 0.05, "policy_lambda": 0.9},
    ],
)
def test_bad_options(options):
    with pytest.raises(ConfigError):
        GAEConfig(**options)
