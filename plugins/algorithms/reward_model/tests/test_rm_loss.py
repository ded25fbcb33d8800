"""The Bradley-Terry loss by numbers worked by hand, and against the contract of losses."""

from __future__ import annotations

import math

import pytest
import torch
from pytest import approx

from nemo_rl_core.errors import ShapeMismatch
from nemo_rl_core.protocols.loss import Loss, ModelOutputs
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.testing import LossContract
from nemo_rl_core.training.model.normalize import NormalizedLoss, count_trained
from nemo_rl_plugins_reward_model.config import BradleyTerryConfig
from nemo_rl_plugins_reward_model.loss import BradleyTerryLoss

torch.set_num_threads(1)


def one_pair(margin=0.0):
    """Scores 1.5 (chosen) and 0.5, at the last tokens; the values before them mean nothing."""
    batch = BatchedDataDict(
        [3, 2],
        {"loss_mask": torch.tensor([False, False, True, False, True])},
        {
            "group_ids": torch.tensor([4, 4]),
            "is_chosen": torch.tensor([True, False]),
            "margins": torch.tensor([margin, margin]),
        },
    )
    return batch, torch.tensor([9.0, math.nan, 1.5, -9.0, 0.5], requires_grad=True)


def test_it_is_a_loss():
    assert isinstance(BradleyTerryLoss(), Loss)


@pytest.mark.parametrize(
    ("options", "value", "chosen", "rejected"),
    [
        ({}, 0.313262, -0.268941, 0.268941),  # -log sigmoid(1); -+ sigmoid(-1)
        ({"margin_weight": 0.5}, math.log(2), -0.5, 0.5),  # the distance of 1 is the margin asked for, 0.5 * 2
        ({"center_coefficient": 0.1}, 0.713262, 0.131059, 0.668941),  # and 0.1 * 2^2; each 2 * 0.1 * 2 more
    ],
)
def test_by_hand(options, value, chosen, rejected):
    batch, values = one_pair(margin=2.0)
    loss = NormalizedLoss(BradleyTerryLoss(BradleyTerryConfig(**options)), count_trained(batch))
    sums = loss(ModelOutputs(values=values), batch)
    sums.total.backward()
    assert sums.total.item() == approx(value, abs=1e-6)
    assert values.grad.tolist() == approx([0.0, 0.0, chosen, 0.0, rejected], abs=1e-6)
    metrics = {name: float(m.total) / float(m.count) for name, m in sums.metrics.items()}
    expected = {"accuracy": 1.0, "rewards/chosen": 1.5, "rewards/rejected": 0.5, "rewards/margins": 1.0}
    assert {name: metrics[name] for name in expected} == approx(expected)


def test_outputs_of_another_shape_are_refused():
    batch, _ = one_pair()
    with pytest.raises(ShapeMismatch, match=r"outputs\.values has shape None, loss_mask \[5\]"):
        BradleyTerryLoss()(ModelOutputs(), batch)


@pytest.mark.parametrize("option", ["margin_weight", "center_coefficient"])
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=option):
        BradleyTerryConfig(**{option: -1.0})


OPTIONS = {
    "plain": {},
    "margin": {"margin_weight": 0.7},
    "centred": {"center_coefficient": 0.01},
}


class TestBradleyTerryLoss(LossContract):
    @pytest.fixture(params=OPTIONS.values(), ids=list(OPTIONS))
    def loss(self, request):
        return BradleyTerryLoss(BradleyTerryConfig(**request.param))
