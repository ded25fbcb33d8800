"""Sampling: worked values, the distribution of the draws, and seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch_engine_kit import complete, request

from nemo_rl_plugins_torch_engine.noise import uniforms
from nemo_rl_plugins_torch_engine.sampling import RowSampling, sample

# of chi-square with 3 degrees of freedom, at p = 0.001
CHI_SQUARE_3 = 16.27


def rows(count, *, scale=None, greedy=None, top_k=None, top_p=None):
    def column(value, dtype):
        return None if value is None else torch.full((count, 1), value, dtype=dtype)

    limited = top_k is not None or top_p is not None
    return RowSampling(
        scale=column(scale, torch.float32),
        greedy=None if greedy is None else torch.tensor(greedy),
        all_greedy=greedy is not None and all(greedy),
        top_k=column(top_k or 4, torch.int64) if limited else None,
        top_p=column(top_p or 2.0, torch.float32) if limited else None,
        max_top_k=top_k or 4,
        noise=torch.zeros(1, count),
    )


LOGITS = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 0), (0.09, 0), (0.11, 1), (0.29, 1), (0.31, 2), (0.59, 2), (0.61, 3), (0.9999, 3)]
)
def test_a_draw_inverts_the_cumulative_distribution(uniform, token):
    tokens, logprobs = sample(LOGITS[None], rows(1), torch.tensor([uniform]))
    assert tokens.tolist() == [token]
    assert logprobs.item() == pytest.approx(float(LOGITS[token]), abs=1e-6)


@pytest.mark.parametrize(
    ("limits", "uniform", "token", "probability"),
    [
        ({"top_k": 2}, 0.0, 3, 4 / 7),  # kept: 0.4 and 0.3, the likeliest first
        ({"top_k": 2}, 0.9, 2, 3 / 7),
        ({"top_k": 1}, 0.99, 3, 1.0),
        ({"top_p": 0.39}, 0.99, 3, 1.0),  # 0.4 alone reaches it
        ({"top_p": 0.41}, 0.9, 2, 3 / 7),  # 0.4 does not
        ({"top_p": 0.75}, 0.99, 1, 0.2 / 0.9),
        ({"top_k": 2, "top_p": 0.5}, 0.99, 3, 1.0),  # of the two kept, 4/7 reaches 0.5
    ],
)
def test_limits_keep_the_smallest_set(limits, uniform, token, probability):
    tokens, logprobs = sample(LOGITS[None], rows(1, **limits), torch.tensor([uniform]))
    assert tokens.tolist() == [token]
    assert logprobs.item() == pytest.approx(math.log(probability), abs=1e-6)


def test_temperature_divides_the_logits():
    _, logprobs = sample(LOGITS[None], rows(1, scale=2.0), torch.tensor([0.99]))  # temperature 0.5
    assert logprobs.item() == pytest.approx(math.log(0.16 / 0.30), abs=1e-6)


def test_a_masked_token_is_never_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0]]).expand(3, -1)
    tokens, logprobs = sample(logits, rows(3), torch.tensor([0.0, 0.5, 1 - 2**-23]))
    assert tokens.tolist() == [1, 3, 3]
    assert logprobs.tolist() == pytest.approx([math.log(0.5)] * 3)


@pytest.mark.parametrize("limits", [{}, {"top_k": 4}, {"top_p": 0.99}])
def test_draws_follow_the_distribution(limits):
    count = 20_000
    uniform = torch.from_numpy(uniforms(range(count), [7] * count, 1))[:, 0]
    tokens, _ = sample(LOGITS.expand(count, -1), rows(count, **limits), uniform)
    expected = count * LOGITS.exp()
    seen = torch.bincount(tokens, minlength=4)
    assert float(((seen - expected) ** 2 / expected).sum()) < CHI_SQUARE_3


@pytest.mark.parametrize("axis", ["seeds", "positions"])
def test_noise_is_uniform_and_uncorrelated(axis):
    n = 50_000
    u = uniforms(range(n), [0] * n, 1)[:, 0] if axis == "seeds" else uniforms([3], [0], n)[0]
    counts = np.bincount((u * 4).astype(int), minlength=4)
    assert ((counts - n / 4) ** 2 / (n / 4)).sum() < CHI_SQUARE_3
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / math.sqrt(n)
    assert u.min() >= 0
    assert u.max() < 1


def test_noise_depends_on_seed_and_position_only():
    block = uniforms([1, -2, 2**70], [0, 5, 9], 4)
    assert (uniforms([-2], [7], 2)[0] == block[1, 2:]).all()
    assert len(np.unique(block)) == block.size


def test_equal_seeds_give_equal_tokens_in_any_company(start):
    engine = start(max_batch_size=5)
    asked = request([5, 6, 7], name="asked", max_new_tokens=100, seed=123, ignore_eos=True)
    alone = complete(engine, asked)[0]
    company = [request([5, 6, 7 + i % 3], max_new_tokens=3 + 2 * i, seed=i) for i in range(15)]
    beside = complete(engine, *company, asked, *company)[len(company)]
    assert beside.token_ids == alone.token_ids
    assert beside.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_without_a_seed_members_of_a_group_differ_and_runs_repeat(start):
    requests = [request([5, 6], max_new_tokens=20, ignore_eos=True) for _ in range(4)]
    first = [c.token_ids for c in complete(start(), *requests)]
    assert len({tuple(t) for t in first}) == 4
    assert [c.token_ids for c in complete(start(), *requests)] == first


def test_sampled_first_tokens_follow_the_model(start):
    engine = start(max_batch_size=256, max_prefill_tokens=64)
    completions = complete(engine, *(request([5, 6], name=str(i), max_new_tokens=1, seed=i) for i in range(2000)))
    model_says = engine._model(input_ids=torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    quarter = torch.arange(104) // 26  # four bins of the vocabulary
    expected = 2000 * torch.zeros(4).index_add_(0, quarter, model_says.detach())
    seen = torch.bincount(quarter[torch.tensor([c.token_ids[0] for c in completions])], minlength=4)
    assert float(((seen - expected) ** 2 / expected).sum()) < CHI_SQUARE_3
