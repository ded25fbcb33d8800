"""A loss's sums are divided once, by the count over the whole global batch."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.loss import LossSums, Metric, ModelOutputs
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.training.model.normalize import GlobalCounts, NormalizedLoss, count_trained


class SumLoss:
    needs = frozenset({"logprobs"})

    def __init__(self, denominator) -> None:
        self.denominator = denominator

    def __call__(self, outputs, batch):
        total = -(outputs.logprobs * batch["loss_mask"]).sum()
        return LossSums(total, {"mean_logprob": Metric(-total.detach(), batch["loss_mask"].sum())})


@pytest.fixture
def batch():
    mask = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 0], dtype=torch.bool)
    return BatchedDataDict([3, 2, 2, 2], {"loss_mask": mask}, {"group_ids": torch.tensor([5, 5, 7, 8])})


def test_counts_by_hand(batch):
    assert count_trained(batch) == GlobalCounts(tokens=3, sequences=2, groups=1)


def test_without_group_ids_each_sequence_is_its_own_group():
    batch = BatchedDataDict([1, 2], {"loss_mask": torch.tensor([True, False, True])})
    assert count_trained(batch).groups == 2


@pytest.mark.parametrize(("denominator", "divisor"), [("tokens", 3), ("sequences", 2), ("groups", 1), (10.0, 10)])
def test_each_denominator(batch, denominator, divisor):
    loss = NormalizedLoss(SumLoss(denominator), count_trained(batch))
    logprobs = -torch.arange(9.0)
    sums = loss(ModelOutputs(logprobs=logprobs), batch)
    assert float(sums.total) == pytest.approx((1 + 2 + 4) / divisor)
    assert float(sums.metrics["loss"].total) == float(sums.total)


def test_micro_batches_add_up_to_the_whole(batch):
    logprobs = torch.linspace(-3, -1, 9, requires_grad=True)
    loss = NormalizedLoss(SumLoss("tokens"), count_trained(batch))
    (whole_grad,) = torch.autograd.grad(loss(ModelOutputs(logprobs=logprobs), batch).total, logprobs)
    parts = [loss(ModelOutputs(logprobs=logprobs[:5]), batch.select([0, 1])).total]
    parts.append(loss(ModelOutputs(logprobs=logprobs[5:]), batch.select([2, 3])).total)
    (split_grad,) = torch.autograd.grad(sum(parts), logprobs)
    torch.testing.assert_close(split_grad, whole_grad, rtol=0, atol=0)


def test_a_batch_with_nothing_to_train_has_loss_zero(batch):
    empty = BatchedDataDict([2], {"loss_mask": torch.zeros(2, dtype=torch.bool)})
    loss = NormalizedLoss(SumLoss("tokens"), count_trained(empty))
    assert float(loss(ModelOutputs(logprobs=torch.zeros(2)), empty).total) == 0.0


def test_an_unknown_denominator_is_refused(batch):
    with pytest.raises(ConfigError, match="declares denominator 'words'.*Allowed"):
        NormalizedLoss(SumLoss("words"), count_trained(batch))
