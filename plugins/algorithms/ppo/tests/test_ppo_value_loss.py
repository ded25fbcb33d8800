"""The value loss: values and gradients by hand, and where in a sequence they stand."""

from __future__ import annotations

import pytest
import torch
from pytest import approx

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.loss import ModelOutputs
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_plugins_ppo.alignment import values_after_last, values_before
from nemo_rl_plugins_ppo.config import ClippedValueConfig
from nemo_rl_plugins_ppo.value_loss import ClippedValueLoss


def sequence(outputs, mask, before, returns, lengths=None, **options):
    """The loss of a batch, and its gradient by each output of the head."""
    outputs = torch.tensor(outputs, dtype=torch.float64, requires_grad=True)
    batch = BatchedDataDict(
        lengths or [len(mask)],
        {
            "loss_mask": torch.tensor(mask, dtype=torch.bool),
            "values": torch.tensor(before, dtype=torch.float64),
            "returns": torch.tensor(returns, dtype=torch.float64),
        },
    )
    sums = ClippedValueLoss(ClippedValueConfig(**options))(ModelOutputs(values=outputs), batch)
    sums.total.backward()
    return sums, outputs.grad.tolist()


@pytest.mark.parametrize(
    ("value", "before", "target", "loss", "grad"),
    [
        (0.5, 0.5, 1.0, 0.125, -0.5),  # not moved: half the square, its gradient V - R
        (0.6, 0.5, 1.0, 0.08, -0.4),  # moved by less than 0.2: not clipped
        (0.9, 0.5, 1.0, 0.045, 0.0),  # moved by 0.4 towards R: held at 0.7, no gradient
        (0.1, 0.5, 1.0, 0.405, -0.9),  # moved away from R: the worse of both, so not clipped
        (1.5, 0.5, 0.9, 0.18, 0.6),  # past R: 0.6 from it, held 0.2 from it; the worse one trains
    ],
)
def test_by_hand(value, before, target, loss, grad):
    sums, grads = sequence([value, 0.0], [0, 1], [0.0, before], [0.0, target], clip_range=0.2)
    assert sums.total.item() == approx(loss)
    assert grads == approx([grad, 0.0])


def test_without_clip_and_with_scale():
    sums, grads = sequence([0.9, 0.0], [0, 1], [0.0, 0.5], [0.0, 1.0], clip_range=None, scale=3.0)
    assert sums.total.item() == approx(3 * 0.005)
    assert grads == approx([3 * -0.1, 0.0])


def test_the_value_of_a_token_is_what_the_head_said_at_the_token_before():
    """Two packed sequences; the outputs at both ends of a sequence are of no trained token's state."""
    sums, grads = sequence(
        [1.0, 2.0, 4.0, 8.0, 16.0],
        [0, 1, 1, 0, 1],
        [0.0] * 5,
        [0.0] * 5,
        lengths=[3, 2],
        clip_range=None,
    )
    assert sums.total.item() == approx((1 + 4 + 64) / 2)
    assert grads == approx([1.0, 2.0, 0.0, 8.0, 0.0])


def test_alignment():
    batch = BatchedDataDict([3, 1, 2])
    outputs = torch.arange(1.0, 7.0)
    assert values_before(outputs, batch).tolist() == [0, 1, 2, 0, 0, 5]
    assert values_after_last(outputs, batch).tolist() == [3, 4, 6]


def test_metrics():
    sums, _ = sequence([0.9, 0.5, 0.0], [0, 1, 1], [0.0, 0.5, 0.5], [0.0, 1.0, 0.0], clip_range=0.2)
    found = {name: float(m.total) / float(m.count) for name, m in sums.metrics.items()}
    assert found == approx(
        {"values_mean": 0.7, "returns_mean": 0.5, "squared_error": (0.01 + 0.25) / 2, "clip_fraction": 0.5}
    )


def test_every_sequence_may_count_the_same():
    """One trained token of error 1, and two of error 2 each: (1 + (4 + 4) / 2) / 2, to be divided by 2 sequences."""
    loss = ClippedValueLoss(ClippedValueConfig(aggregation="sequence"))
    assert loss.denominator == "sequences"
    sums, _ = sequence(
        [1.0, 0.0, 2.0, 2.0, 0.0],
        [0, 1, 0, 1, 1],
        [0.0] * 5,
        [0.0] * 5,
        lengths=[2, 3],
        clip_range=None,
        aggregation="sequence",
    )
    assert sums.total.item() == approx(2.5)


def test_without_returns_it_says_what_is_missing():
    batch = BatchedDataDict([2], {"loss_mask": torch.tensor([False, True])})
    with pytest.raises(ConfigError, match=r"`ppo_value` needs returns, values"):
        ClippedValueLoss()(ModelOutputs(values=torch.zeros(2)), batch)


@pytest.mark.parametrize("options", [{"clip_range": 0.0}, {"scale": 0.0}, {"aggregation": "batch"}])
def test_bad_options(options):
    with pytest.raises(ConfigError):
        ClippedValueConfig(**options)
