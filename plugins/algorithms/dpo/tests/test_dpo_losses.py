"""Every loss by numbers worked by hand.

One pair: the chosen answer has two tokens, of logprob -1 and -2 (reference: -4 together), the rejected one token of
-1.5 (reference: -1). So the log-ratios are +1 and -0.5, their difference 1.5, and the mean logprobs are both -1.5.
"""

from __future__ import annotations

import math

import pytest
import torch
from pytest import approx

from nemo_rl_core.errors import ConfigError, ShapeMismatch
from nemo_rl_core.protocols.loss import Loss, ModelOutputs
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.training.model.normalize import NormalizedLoss, count_trained
from nemo_rl_plugins_dpo.config import (
    DPOLossConfig,
    IPOConfig,
    KTOConfig,
    ORPOConfig,
    RPOConfig,
    SimPOConfig,
    SmoothedDPOConfig,
)
from nemo_rl_plugins_dpo.losses.cdpo import ConservativeDPOLoss
from nemo_rl_plugins_dpo.losses.hinge import HingeDPOLoss
from nemo_rl_plugins_dpo.losses.ipo import IPOLoss
from nemo_rl_plugins_dpo.losses.kto import KTOLoss
from nemo_rl_plugins_dpo.losses.normalized import NormalizedDPOLoss
from nemo_rl_plugins_dpo.losses.orpo import ORPOLoss
from nemo_rl_plugins_dpo.losses.robust import RobustDPOLoss
from nemo_rl_plugins_dpo.losses.rpo import RPOLoss
from nemo_rl_plugins_dpo.losses.sigmoid import DPOLoss
from nemo_rl_plugins_dpo.losses.simpo import SimPOLoss

HALF = DPOLossConfig(beta=0.5)  # the difference of the rewards is 0.75
SMOOTHED = SmoothedDPOConfig(beta=0.5, label_smoothing=0.1)
PAIR_LOSSES = [
    DPOLoss(),
    RPOLoss(),
    HingeDPOLoss(),
    IPOLoss(),
    ConservativeDPOLoss(),
    RobustDPOLoss(),
    NormalizedDPOLoss(),
    ORPOLoss(),
    SimPOLoss(),
]


def one_pair(logprobs=(0.0, -1.0, -2.0, 0.0, -1.5), ref=(0.0, -1.0, -3.0, 0.0, -1.0)):
    batch = BatchedDataDict(
        [3, 2],
        {
            "loss_mask": torch.tensor([False, True, True, False, True]),
            "ref_logprobs": torch.tensor(ref, dtype=torch.float64),
        },
        {
            "group_ids": torch.tensor([0, 0]),
            "is_chosen": torch.tensor([True, False]),
            "kl_estimate": torch.tensor([0.4, 0.4], dtype=torch.float64),
        },
    )
    return batch, torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)


def answer(loss, batch, logprobs):
    """The divided loss, and its gradient at each token."""
    sums = NormalizedLoss(loss, count_trained(batch))(ModelOutputs(logprobs=logprobs), batch)
    sums.total.backward()
    return sums, logprobs.grad


@pytest.mark.parametrize(
    ("loss", "value", "chosen", "rejected"),
    [
        # -log sigmoid(0.75); -+ 0.5 sigmoid(-0.75)
        (DPOLoss(HALF), 0.386871, -0.160411, 0.160411),
        # and the mean of 1 and 2
        (RPOLoss(RPOConfig(beta=0.5)), 1.886871, -0.160411 - 0.5, 0.160411),
        (DPOLoss(DPOLossConfig(beta=0.5, nll_weight=0.2)), 0.386871 + 0.3, -0.160411 - 0.1, 0.160411),
        # 1 - 0.75
        (HingeDPOLoss(HALF), 0.25, -0.5, 0.5),
        (HingeDPOLoss(DPOLossConfig(beta=1.0)), 0.0, 0.0, 0.0),
        # (0.5 - -0.5 - 2)^2 per token; 2 (-1) / 2 and -2 (-1)
        (IPOLoss(IPOConfig(beta=0.25)), 1.0, -1.0, 2.0),
        # (1 - -0.5 - 2)^2 in sums
        (IPOLoss(IPOConfig(beta=0.25, average_logprobs=False)), 0.25, -1.0, 1.0),
        # 0.9 * 0.386871 + 0.1 * 1.136871; 0.5 (-0.9 * 0.320821 + 0.1 * 0.679179)
        (ConservativeDPOLoss(SMOOTHED), 0.461871, -0.110411, 0.110411),
        # (0.9 * 0.386871 - 0.1 * 1.136871) / 0.8; 0.5 (-0.9 * 0.320821 - 0.1 * 0.679179) / 0.8
        (RobustDPOLoss(SMOOTHED), 0.293121, -0.222911, 0.222911),
        # -log sigmoid(0.5 (0.5 - -0.5)); the chosen answer's gradient is shared by its two tokens
        (NormalizedDPOLoss(HALF), 0.474077, -0.094385, 0.188770),
        # 1.5 + 0.5 ln 2, for the odds are equal; (-1 - 0.25 / (1 - e^-1.5)) / 2 and 0.25 / (1 - e^-1.5)
        (ORPOLoss(ORPOConfig(beta=0.5)), 1.846574, -0.660903, 0.321805),
        # -log sigmoid(-1), for the means are equal; -2 sigmoid(1) / 2 and 2 sigmoid(1)
        (SimPOLoss(SimPOConfig()), 1.313262, -0.731059, 1.462117),
        # ((1 - sigmoid(0.5 (1 - 0.4))) + (1 - sigmoid(0.5 (0.4 + 0.5)))) / 2
        (KTOLoss(KTOConfig(beta=0.5)), 0.407459, -0.061115, 0.059440),
        (KTOLoss(KTOConfig(beta=0.5, desirable_weight=2.0, undesirable_weight=0.0)), 0.425557, -0.122229, 0.0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Loss) else "",
)
def test_by_hand(loss, value, chosen, rejected):
    sums, grad = answer(loss, *one_pair())
    assert sums.total.item() == approx(value, abs=1e-6)
    assert grad.tolist() == approx([0.0, chosen, chosen, 0.0, rejected], abs=1e-6)


@pytest.mark.parametrize("loss", [DPOLoss, HingeDPOLoss, RobustDPOLoss, ConservativeDPOLoss, RPOLoss])
def test_metrics(loss):
    sums, _ = answer(loss(), *one_pair())
    found = {name: float(metric.total) / float(metric.count) for name, metric in sums.metrics.items() if name != "loss"}
    assert found == approx(
        {
            "rewards/chosen": 0.1,
            "rewards/rejected": -0.05,
            "rewards/margins": 0.15,
            "rewards/accuracies": 1.0,
            "logps/chosen": -3.0,
            "logps/rejected": -1.5,
            "nll": 1.5,
        }
    )


def test_metrics_of_answers_with_a_verdict():
    sums, _ = answer(KTOLoss(), *one_pair())
    metrics = {name: (float(m.total), float(m.count)) for name, m in sums.metrics.items() if name != "loss"}
    assert metrics["rewards/chosen"] == approx((0.1, 1))
    assert metrics["logps/rejected"] == approx((-1.5, 1))
    assert metrics["rewards/accuracies"] == (2.0, 2)
    assert metrics["kl"] == approx((0.8, 2))


def test_while_policy_and_reference_are_one_the_loss_is_ln_2():
    batch, logprobs = one_pair(ref=(0.0, -1.0, -2.0, 0.0, -1.5))
    assert answer(DPOLoss(), batch, logprobs)[0].total.item() == math.log(2)


@pytest.mark.parametrize("loss", PAIR_LOSSES, ids=lambda loss: type(loss).__name__)
class TestPairs:
    def test_a_pair_of_which_one_side_is_untrained_counts_for_nothing(self, loss):
        batch, logprobs = one_pair()
        batch.set_tokens("loss_mask", torch.tensor([False, True, True, False, False]))
        sums, grad = answer(loss, batch, logprobs)
        assert sums.total.item() == 0.0
        assert grad.tolist() == [0.0] * 5

    def test_what_is_no_pair_is_refused(self, loss):
        batch, logprobs = one_pair()
        batch.set_sequences("group_ids", torch.tensor([0, 1]))
        with pytest.raises(ShapeMismatch, match='unit = "group"'):
            loss(ModelOutputs(logprobs=logprobs), batch)
        with pytest.raises(ShapeMismatch, match="1 chosen and 0 rejected"):
            loss(ModelOutputs(logprobs=logprobs[:3]), batch.select([0]))

    def test_outputs_of_another_shape_are_refused(self, loss):
        batch, _ = one_pair()
        with pytest.raises(ShapeMismatch, match=r"outputs\.logprobs has shape \[3\], loss_mask \[5\]"):
            loss(ModelOutputs(logprobs=torch.zeros(3)), batch)


def test_a_certain_answer_has_finite_odds():
    batch, logprobs = one_pair(logprobs=(0.0, 0.0, 0.0, 0.0, -1.5))
    sums, grad = answer(ORPOLoss(), batch, logprobs)
    assert math.isfinite(sums.total.item()) and bool(grad.isfinite().all())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DPOLossConfig(beta=0.0), "beta"),
        (lambda: DPOLossConfig(nll_weight=-1.0), "nll_weight"),
        (lambda: SmoothedDPOConfig(label_smoothing=0.5), "label_smoothing"),
        (lambda: KTOConfig(desirable_weight=-1.0), "desirable_weight"),
        (lambda: SimPOConfig(gamma=-0.1), "gamma"),
        (lambda: ORPOConfig(beta=-0.1), "beta"),
    ],
)
def test_options_out_of_range_are_refused(make, says):
    with pytest.raises((ConfigError, ValueError), match=says):
        make()
