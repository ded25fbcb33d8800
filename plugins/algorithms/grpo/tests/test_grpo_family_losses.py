"""GSPO, CISPO, REINFORCE, Dr. GRPO and the NLL of rewarded responses, by numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from pytest import approx

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.loss import Loss, ModelOutputs
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_plugins_grpo.loss_config import GSPOLossConfig, ReinforceLossConfig
from nemo_rl_plugins_grpo.losses.cispo import CISPOLoss
from nemo_rl_plugins_grpo.losses.clipped import ClippedPolicyGradientLoss
from nemo_rl_plugins_grpo.losses.dr_grpo import DrGRPOLoss
from nemo_rl_plugins_grpo.losses.gspo import GSPOLoss
from nemo_rl_plugins_grpo.losses.reinforce import ReinforceLoss

LOSSES = [ClippedPolicyGradientLoss, DrGRPOLoss, GSPOLoss, CISPOLoss, ReinforceLoss]


def run(loss_class, options, current, *, lengths=None, mask=None, advantages=1.0, rewards=None, **fields):
    """The sums of one batch and the gradient of its current logprobs; the engine is the trainer unless said."""
    current = torch.as_tensor(current, dtype=torch.float64).requires_grad_()
    n = len(current)
    tokens = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in fields.items()}
    tokens.setdefault("rollout_logprobs", tokens.get("logprobs", current.detach()).clone())
    tokens["advantages"] = torch.as_tensor(advantages, dtype=torch.float64).expand(n)
    tokens["loss_mask"] = torch.ones(n, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    batch = BatchedDataDict(lengths or [n], tokens, {"rewards": torch.tensor(rewards)} if rewards else None)
    sums = loss_class(loss_class.config_class(**options))(ModelOutputs(logprobs=current), batch)
    sums.total.backward()
    return sums, current.grad


def value(metric):
    return float(metric.total) / float(metric.count) if metric.reduction == "mean" else float(metric.total)


def logs(*ratios):
    """Logprobs whose ratio to -1 is that."""
    return [math.log(r) - 1 for r in ratios]


@pytest.mark.parametrize("loss_class", LOSSES)
def test_they_are_losses(loss_class):
    assert isinstance(loss_class(), Loss)
    assert loss_class().config == loss_class.config_class()


@pytest.mark.parametrize("loss_class", LOSSES)
def test_on_policy_every_one_is_the_policy_gradient(loss_class):
    """Ratio 1, nothing clipped, gradient -A times what a token counts, without old logprobs in the batch."""
    advantages = [2.0, -1.0, -1.0, -1.0]
    sums, grad = run(
        loss_class, {"aggregation": "token"}, [-0.5, -2.0, -1.0, -0.1], lengths=[1, 3], advantages=advantages
    )
    assert grad.tolist() == approx([-2.0, 1.0, 1.0, 1.0])
    if loss_class is not ReinforceLoss:
        for name, expected in {
            "probs_ratio": 1,
            "probs_ratio_min": 1,
            "probs_ratio_max": 1,
            "clip_fraction": 0,
        }.items():
            assert value(sums.metrics[name]) == expected
    assert value(sums.metrics["token_mult_prob_error"]) == 1.0


# -- GSPO --------------------------------------------------------------------------------------------------------

WIDE = {"ratio_clip_min": 0.2, "ratio_clip_max": 0.2}
S = math.sqrt(1.2)  # of ratios 1.2 and 1.0: 1.0954


@pytest.mark.parametrize(
    ("options", "ratios", "advantage", "loss", "grad"),
    [
        (WIDE, (1.2, 1.0), 2.0, -2 * S, -S),  # each of two tokens has half of -A * s
        (WIDE, (1.2, 1.0), -2.0, 2 * S, S),
        ({}, (1.2, 1.0), 2.0, -2 * 1.0004, 0.0),  # above 1 + 4e-4: capped, no gradient
        ({}, (1.2, 1.0), -2.0, 2 * S, S),  # the pessimistic side is not clipped
        ({}, (0.8, 1.0), -2.0, 2 * 0.9997, 0.0),  # below 1 - 3e-4
        (WIDE, (2.0, 0.5), 2.0, -2.0, -1.0),  # the ratios of the tokens cancel: nothing is clipped
        ({**WIDE, "length_normalized": False}, (1.1, 1.05), 2.0, -2 * 1.155, -2 * 1.155),  # product
        ({**WIDE, "length_normalized": False}, (1.2, 1.1), 2.0, -2.4, 0.0),  # 1.32 is held at 1.2
    ],
)
def test_gspo(options, ratios, advantage, loss, grad):
    sums, got = run(GSPOLoss, options, logs(*ratios), advantages=advantage, logprobs=[-1.0, -1.0])
    assert sums.total.item() == approx(loss)
    assert got.tolist() == approx([grad, grad])


def test_the_ratio_of_a_sequence_is_over_its_trained_tokens():
    sums, grad = run(
        GSPOLoss, WIDE, logs(1.2, 9.0, 1.0, 1.1), lengths=[3, 1], mask=[True, False, True, True], logprobs=[-1.0] * 4
    )
    assert sums.total.item() == approx(-S - 1.1)
    assert grad.tolist() == approx([-S / 2, 0.0, -S / 2, -1.1])
    assert value(sums.metrics["probs_ratio_max"]) == approx(1.1)


def test_the_gradient_of_gspo_is_that_of_its_formula():
    """As derived from -min(s * A, clip(s) * A) with s = exp(mean log-ratio), differentiated through s."""
    old, current = torch.tensor([-1.0, -0.7, -2.0, -0.3]), torch.tensor([-1.1, -0.6, -1.9, -0.35])
    _, grad = run(GSPOLoss, WIDE, current, lengths=[3, 1], advantages=[0.7, 0.7, 0.7, -1.3], logprobs=old)
    leaf = current.double().requires_grad_()
    s = torch.stack([(leaf - old)[:3].mean(), (leaf - old)[3]]).exp()
    a = torch.tensor([0.7, -1.3], dtype=torch.float64)
    (-torch.minimum(s * a, s.clamp(0.8, 1.2) * a)).sum().backward()
    assert grad.tolist() == approx(leaf.grad.tolist())


def test_in_gspo_the_advantage_of_a_token_moves_that_token():
    _, grad = run(GSPOLoss, WIDE, [-1.0, -1.0], advantages=[3.0, -1.0], logprobs=[-1.0, -1.0])
    assert grad.tolist() == approx([-1.5, 0.5])


@pytest.mark.parametrize(
    ("options", "weight"),
    [  # trainer / engine 0.25 and 1: geometric mean 0.5, product 0.25
        ({"correction": "importance"}, 0.5),
        ({"correction": "tis", "correction_min": 0.6, "correction_max": 2.0}, 0.6),
        ({"correction": "icepop", "correction_min": 0.6, "correction_max": 2.0}, 0.0),
        ({"correction": "importance", "length_normalized": False}, 0.25),
    ],
)
def test_the_correction_of_gspo_is_one_number_for_a_sequence(options, weight):
    sums, grad = run(GSPOLoss, options, [-1.0, -1.0], rollout_logprobs=[-1 + math.log(4), -1.0])
    assert sums.total.item() == approx(-weight)
    assert grad[0] == grad[1]


def test_gspo_has_no_sequence_mask_beside_its_own_weights():
    with pytest.raises(ConfigError, match="icepop"):
        GSPOLossConfig(correction="seq_mask_tis", correction_min=0.5, correction_max=2.0)


# -- CISPO -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "ratio", "advantage", "weight"),
    [
        ({}, 1.0, 2.0, 1.0),
        ({}, 7.0, 2.0, 5.0),  # bounded, and the gradient stays
        ({}, 7.0, -2.0, 5.0),
        ({}, 0.01, 2.0, 0.01),  # no lower bound
        ({"ratio_clip_min": 0.2}, 0.5, 2.0, 0.8),
    ],
)
def test_cispo(options, ratio, advantage, weight):
    sums, grad = run(CISPOLoss, options, [-1.0], advantages=advantage, logprobs=[-1 - math.log(ratio)])
    assert sums.total.item() == approx(-advantage * weight * -1.0)
    assert grad.item() == approx(-advantage * weight)
    assert value(sums.metrics["clip_fraction"]) == float(weight != ratio)


# -- REINFORCE, Dr. GRPO -----------------------------------------------------------------------------------------

TWO = {"lengths": [1, 3], "advantages": [4.0, 1.0, 1.0, 1.0]}


@pytest.mark.parametrize(
    ("options", "denominator", "loss", "grad"),
    [
        ({}, "sequences", 4 * 0.5 + (1 + 2 + 3), [-4.0, -1.0, -1.0, -1.0]),
        ({"aggregation": "token"}, "tokens", 8.0, [-4.0, -1.0, -1.0, -1.0]),
        ({"aggregation": "sequence"}, "sequences", 2.0 + 2.0, [-4.0, -1 / 3, -1 / 3, -1 / 3]),
    ],
)
def test_reinforce(options, denominator, loss, grad):
    sums, got = run(ReinforceLoss, options, [-0.5, -1.0, -2.0, -3.0], **TWO)
    assert ReinforceLoss(ReinforceLossConfig(**options)).denominator == denominator
    assert sums.total.item() == approx(loss)
    assert got.tolist() == approx(grad)


def test_reinforce_asks_for_old_logprobs_only_to_correct_with():
    assert ReinforceLoss().required_fields == frozenset()
    corrected = ReinforceLossConfig(correction="tis", correction_max=2.0)
    assert ReinforceLoss(corrected).required_fields == {"logprobs"}


def test_dr_grpo_divides_by_a_constant():
    sums, grad = run(DrGRPOLoss, {"constant_length": 5}, [-1.0] * 4, **TWO)
    assert DrGRPOLoss().denominator == "sequences"
    assert sums.total.item() == approx(-(4 + 1 + 1 + 1) / 5)
    assert grad.tolist() == approx([-0.8, -0.2, -0.2, -0.2])


# -- negative log-likelihood of rewarded responses ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "rewards", "nll", "grad"),
    [
        (0.0, [1.0, 0.0], 0.5, [-0.1, 0.0, 0.0]),
        (0.0, [0.0, 0.5], 2.0 + 3.0, [0.0, -0.1, -0.1]),
        (0.6, [1.0, 0.5], 0.5, [-0.1, 0.0, 0.0]),
        (0.0, [0.0, -1.0], 0.0, [0.0, 0.0, 0.0]),
    ],
)
def test_nll_of_what_was_rewarded(threshold, rewards, nll, grad):
    options = {"positive_nll_weight": 0.1, "positive_nll_threshold": threshold}
    sums, got = run(
        ClippedPolicyGradientLoss, options, [-0.5, -2.0, -3.0], lengths=[1, 2], advantages=0.0, rewards=rewards
    )
    assert sums.total.item() == approx(0.1 * nll)
    assert got.tolist() == approx(grad)
    count = float(sums.metrics["positive_nll"].count)
    assert float(sums.metrics["positive_nll"].total) == approx(nll)
    assert count == sum(g != 0 for g in grad)


def test_the_nll_looks_at_rewards_before_shaping():
    tokens = {
        "loss_mask": torch.ones(1, dtype=torch.bool),
        "advantages": torch.zeros(1),
        "rollout_logprobs": -torch.ones(1),
    }
    batch = BatchedDataDict([1], tokens, {"rewards": torch.tensor([-1.0]), "raw_rewards": torch.tensor([1.0])})
    loss = ClippedPolicyGradientLoss(ClippedPolicyGradientLoss.config_class(positive_nll_weight=1.0))
    assert loss(ModelOutputs(logprobs=-torch.ones(1)), batch).total.item() == approx(1.0)
