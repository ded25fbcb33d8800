"""Negative log likelihood, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from pytest import approx

from nemo_rl_core.errors import ShapeMismatch
from nemo_rl_core.protocols.loss import Loss, ModelOutputs
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.training.model.normalize import NormalizedLoss, count_trained
from nemo_rl_plugins_sft.loss import NLLLoss


def batch_of(mask, lengths):
    return BatchedDataDict(
        lengths, {"loss_mask": torch.tensor(mask, dtype=torch.bool), "position": torch.arange(len(mask))}
    )


def test_it_is_a_loss():
    assert isinstance(NLLLoss(), Loss)


def test_mean_over_trained_tokens():
    batch = batch_of([0, 1, 1, 0, 1], [3, 2])
    logprobs = torch.tensor([0.0, -1.0, -2.0, 0.0, -4.0], requires_grad=True)
    sums = NormalizedLoss(NLLLoss(), count_trained(batch))(ModelOutputs(logprobs=logprobs), batch)
    sums.total.backward()
    assert sums.total.item() == approx(7 / 3)
    assert logprobs.grad.tolist() == approx([0, -1 / 3, -1 / 3, 0, -1 / 3])
    assert float(sums.metrics["nll"].total) / float(sums.metrics["nll"].count) == approx(7 / 3)


@pytest.mark.parametrize("poison", [math.nan, -math.inf, math.inf])
def test_masked_positions_move_nothing(poison):
    batch = batch_of([0, 1, 0, 1], [2, 2])
    logprobs = torch.tensor([poison, -1.0, poison, -2.0], requires_grad=True)
    sums = NLLLoss()(ModelOutputs(logprobs=logprobs), batch)
    sums.total.backward()
    assert sums.total.item() == 3.0
    assert logprobs.grad.tolist() == [0, -1, 0, -1]


def test_nothing_trained_is_zero():
    batch = batch_of([0, 0], [2])
    logprobs = torch.tensor([-1.0, math.nan], requires_grad=True)
    sums = NormalizedLoss(NLLLoss(), count_trained(batch))(ModelOutputs(logprobs=logprobs), batch)
    sums.total.backward()
    assert sums.total.item() == 0
    assert logprobs.grad.tolist() == [0, 0]


@pytest.mark.parametrize("parts", [[[0], [1], [2]], [[2, 0], [], [1]]])
def test_micro_batches_add_up_to_the_whole(parts):
    batch = batch_of([0, 1, 0, 1, 1, 1, 0, 0, 1], [2, 4, 3])
    logprobs = -torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = NormalizedLoss(NLLLoss(), count_trained(batch))
    whole = logprobs.clone().requires_grad_()
    expected = loss(ModelOutputs(logprobs=whole), batch).total
    expected.backward()
    cut = logprobs.clone().requires_grad_()
    total = 0.0
    for part in parts:
        micro = batch.select(part)
        sums = loss(ModelOutputs(logprobs=cut[micro["position"]]), micro)
        sums.total.backward()
        total += sums.total.item()
    assert total == approx(expected.item())
    assert torch.allclose(cut.grad, whole.grad)


def test_outputs_of_another_shape_are_refused():
    with pytest.raises(ShapeMismatch, match=r"\[1, 2\].*\[2\]"):
        NLLLoss()(ModelOutputs(logprobs=torch.zeros(1, 2)), batch_of([0, 1], [2]))
