"""The clipped surrogate: values and gradients by hand."""

from __future__ import annotations

import math

import pytest
import torch
from pytest import approx

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.loss import ModelOutputs
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_plugins_ppo.config import ClippedSurrogateConfig
from nemo_rl_plugins_ppo.policy_loss import ClippedSurrogateLoss


def one_token(ratio, advantage, *, against="logprobs", ref=None, entropy=None, **options):
    """Loss and gradient by the logprob of one sampled token after a prompt of one."""
    logprobs = torch.tensor([0.0, -1.0], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([False, True])
    start = torch.tensor([0.0, -1.0 - math.log(ratio)], dtype=torch.float64)
    batch = BatchedDataDict([2], {"loss_mask": mask, "advantages": torch.tensor([0.0, advantage]).double()})
    batch.set_tokens("rollout_logprobs", start if against == "rollout_logprobs" else torch.full((2,), -1.3).double())
    if against == "logprobs":
        batch.set_tokens("logprobs", start)
    if ref is not None:
        batch.set_tokens("ref_logprobs", torch.tensor([0.0, ref]).double())
    outputs = ModelOutputs(logprobs=logprobs, entropy=entropy)
    sums = ClippedSurrogateLoss(ClippedSurrogateConfig(**options))(outputs, batch)
    sums.total.backward()
    return sums.total.item(), logprobs.grad[1].item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad"),
    [
        (1.0, 2.0, -2.0, -2.0),  # on policy: the plain policy gradient
        (1.5, 2.0, -2.6, 0.0),  # above the upper bound, A > 0: capped, no gradient
        (1.5, -2.0, 3.0, 3.0),  # same ratio, A < 0: the pessimistic side is not clipped
        (0.5, 2.0, -1.0, -1.0),  # below the lower bound, A > 0: not clipped
        (0.5, -2.0, 1.6, 0.0),  # below, A < 0: capped, no gradient
    ],
)
@pytest.mark.parametrize("against", ["logprobs", "rollout_logprobs"])
def test_each_side_of_the_clip(ratio, advantage, loss, grad, against):
    where = {"logprobs": "step_start", "rollout_logprobs": "rollout"}[against]
    found = one_token(ratio, advantage, against=against, ratio_clip_max=0.3, ratio_against=where)
    assert found == approx((loss, grad))


def test_dual_clip():
    assert one_token(5.0, -2.0, ratio_clip_c=3.0) == approx((6.0, 0.0))
    assert one_token(2.0, -2.0, ratio_clip_c=3.0) == approx((4.0, 4.0))


def test_without_logprobs_in_the_batch_the_ratio_is_one():
    assert one_token(7.0, 2.0, against=None) == approx((-2.0, -2.0))


@pytest.mark.parametrize(("kind", "value", "slope"), [("k1", 0.5, 1.0), ("k2", 0.125, 0.5), ("k3", None, None)])
def test_kl_to_the_reference(kind, value, slope):
    """x = log(ref / policy) = -0.5. The gradient is that of the expectation: the estimator's slope plus its value."""
    if kind == "k3":
        value, slope = math.exp(-0.5) - 1 + 0.5, 1 - math.exp(-0.5)
    loss, grad = one_token(1.0, 0.0, ref=-1.5, reference_kl_beta=0.1, reference_kl_type=kind)
    assert (loss, grad) == approx((0.1 * value, 0.1 * (slope + value)))


def test_entropy_is_raised():
    entropy = torch.tensor([0.0, 0.7], dtype=torch.float64, requires_grad=True)
    loss, _ = one_token(1.0, 0.0, entropy=entropy, entropy_coef=0.1)
    assert loss == approx(-0.07)
    assert entropy.grad.tolist() == approx([0.0, -0.1])
    assert ClippedSurrogateLoss(ClippedSurrogateConfig(entropy_coef=0.1)).needs == {"logprobs", "entropy"}


def test_what_it_requires_of_the_batch():
    def required(**options):
        return ClippedSurrogateLoss(ClippedSurrogateConfig(**options)).required_fields

    assert required() == {"logprobs"}
    assert required(ratio_against="rollout", reference_kl_beta=0.1) == {"ref_logprobs"}


def test_metrics():
    logprobs = torch.tensor([0.0, -1.0, -1.0])
    batch = BatchedDataDict(
        [3],
        {
            "loss_mask": torch.tensor([False, True, True]),
            "advantages": torch.tensor([0.0, 1.0, -1.0]),
            "logprobs": torch.tensor([0.0, -1.0 - math.log(1.5), -1.0]),
            "rollout_logprobs": torch.tensor([0.0, -1.0 - math.log(1.5), -1.1]),
        },
    )
    sums = ClippedSurrogateLoss()(ModelOutputs(logprobs=logprobs.requires_grad_()), batch)
    found = {name: float(m.total) / float(m.count) for name, m in sums.metrics.items()}
    assert found == approx(
        {
            "probs_ratio": 1.25,
            "clip_fraction": 0.5,
            "approx_kl": (0.5 - math.log(1.5)) / 2,
            "actor_loss": (-1.2 + 1.0) / 2,
            "token_mult_prob_error": (1 + math.exp(0.1)) / 2,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"ratio_clip_min": 1.2},
        {"ratio_clip_c": 1.0},
        {"entropy_coef": -1.0},
        {"reference_kl_type": "k4"},
        {"ratio_against": "engine"},
        {"aggregation": "group"},
    ],
)
def test_bad_options(options):
    with pytest.raises(ConfigError):
        ClippedSurrogateConfig(**options)
