"""The contract of a loss against losses broken on purpose, one at least for each clause."""

from __future__ import annotations

import threading

import pytest
import torch

from nemo_rl_core.protocols.loss import LossSums, Metric
from nemo_rl_core.testing import LossContract, run_kit
from nemo_rl_core.testing.conformance.frame.kit import clauses

torch.set_num_threads(1)


class Sound:
    """A clipped policy gradient in four steps, each of which a broken loss replaces."""

    denominator = "tokens"
    needs = frozenset({"logprobs"})

    def __call__(self, outputs, batch):
        mask = batch["loss_mask"]
        logprobs = outputs.logprobs.masked_fill(~mask, 0.0)
        old, advantages = (batch[name].masked_fill(~mask, 0.0) for name in ("logprobs", "advantages"))
        terms = self.terms(logprobs, old, advantages)
        return LossSums(self.reduce(terms, mask, batch), self.metrics(terms.detach(), mask))

    def terms(self, logprobs, old, advantages):
        ratio = (logprobs - old).exp()
        return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)

    def reduce(self, terms, mask, batch):
        return (terms * mask).sum()

    def metrics(self, terms, mask):
        return {"surrogate": Metric((terms * mask).sum(), mask.sum())}


class MeanDenominator(Sound):
    denominator = "mean"


class NegativeDenominator(Sound):
    denominator = -1.0


class UnknownNeed(Sound):
    needs = frozenset({"logprobs", "hidden_states"})


class UndeclaredNeed(Sound):
    def __call__(self, outputs, batch):
        sums = super().__call__(outputs, batch)
        sums.total = sums.total - 0.01 * outputs.entropy.masked_fill(~batch["loss_mask"], 0.0).sum()
        return sums


class ReturnsTensor(Sound):
    def __call__(self, outputs, batch):
        return super().__call__(outputs, batch).total


class ReturnsVector(Sound):
    def reduce(self, terms, mask, batch):
        return terms * mask


class Detached(Sound):
    def reduce(self, terms, mask, batch):
        return (terms * mask).sum().detach()


class PlainMetrics(Sound):
    def metrics(self, terms, mask):
        return {"surrogate": float(terms.mean())}


class MetricWithGradient(Sound):
    def __call__(self, outputs, batch):
        sums = super().__call__(outputs, batch)
        return LossSums(sums.total, {"loss": Metric(sums.total)})


class WeightedByPlace(Sound):
    def reduce(self, terms, mask, batch):
        return (terms * mask * (1.0 + batch.sequence_index)).sum()


class MeanOfMicroBatch(Sound):
    def reduce(self, terms, mask, batch):
        return (terms * mask).sum() / mask.sum().clamp(min=1)


class CentredOnMicroBatch(Sound):
    def terms(self, logprobs, old, advantages):
        return super().terms(logprobs, old, advantages - advantages.mean())


class CumulativeOverNeighbours(Sound):
    def terms(self, logprobs, old, advantages):
        return -(logprobs - old).cumsum(0).exp() * advantages


class LooksTwoTokensBack(Sound):
    def terms(self, logprobs, old, advantages):
        return super().terms(logprobs, old, advantages) + 0.1 * logprobs.roll(2) * advantages


class DividedByLength(Sound):
    denominator = "sequences"

    def reduce(self, terms, mask, batch):
        return (terms * mask / batch.expand_to_tokens(batch.lengths)).sum()


class DividedByPaddedLength(Sound):
    denominator = "sequences"

    def reduce(self, terms, mask, batch):
        return (terms * mask).sum() / batch.max_length


class LeakingMask(Sound):
    def __call__(self, outputs, batch):
        sums = super().__call__(outputs, batch)
        sums.total = sums.total - 0.1 * outputs.logprobs.sum()
        return sums


class MasksAfterTheRatio(Sound):
    """nan * 0 is nan."""

    def __call__(self, outputs, batch):
        mask = batch["loss_mask"]
        terms = self.terms(outputs.logprobs, batch["logprobs"], batch["advantages"])
        return LossSums((terms * mask).sum(), self.metrics(terms.detach().masked_fill(~mask, 0.0), mask))


class NanInMetrics(Sound):
    def __call__(self, outputs, batch):
        sums = super().__call__(outputs, batch)
        return LossSums(sums.total, {"advantage": Metric((batch["advantages"] * batch["loss_mask"]).sum())})


class MeanOfSequences(Sound):
    """0 / 0 where a sequence trains nothing."""

    denominator = "sequences"

    def reduce(self, terms, mask, batch):
        return (batch.sum_per_sequence(terms * mask) / batch.sum_per_sequence(mask.double())).sum()


class ConstantPenalty(Sound):
    def reduce(self, terms, mask, batch):
        return (terms * mask).sum() + 1.0


class StopsTheGradientOfTheRatio(Sound):
    def terms(self, logprobs, old, advantages):
        return -(logprobs - old).exp().detach() * advantages * logprobs


class RoundsToFloat32(Sound):
    def terms(self, logprobs, old, advantages):
        return super().terms(logprobs.float(), old.float(), advantages.float())


class WrongSign(Sound):
    def terms(self, logprobs, old, advantages):
        return -super().terms(logprobs, old, advantages)


class AbsoluteAdvantage(Sound):
    def terms(self, logprobs, old, advantages):
        return super().terms(logprobs, old, advantages.abs())


class WeightedByProbability(Sound):
    def terms(self, logprobs, old, advantages):
        return -(2 * logprobs - old).exp() * advantages


class EditsInPlace(Sound):
    def __call__(self, outputs, batch):
        batch["advantages"].masked_fill_(~batch["loss_mask"], 0.0)
        return super().__call__(outputs, batch)


class AddsAField(Sound):
    def __call__(self, outputs, batch):
        batch.set_tokens("ratio", (outputs.logprobs - batch["logprobs"]).detach().exp())
        return super().__call__(outputs, batch)


class SeedsGlobalNumbers(Sound):
    def __call__(self, batch, output):
        torch.manual_seed(0)
        return super().__call__(batch, output)


class MetricsOfMeans(Sound):
    def metrics(self, terms, mask):
        return {"surrogate": Metric((terms * mask).sum() / mask.sum().clamp(min=1))}


class MetricsThatComeAndGo(Sound):
    def metrics(self, terms, mask):
        return {"many": Metric(mask.sum(), reduction="sum")} if mask.sum() > 8 else {}


class KeepsAnAverage(Sound):
    def __init__(self):
        self.average = 0.0

    def terms(self, logprobs, old, advantages):
        self.average = 0.9 * self.average + 0.1 * float(advantages.abs().sum())
        return super().terms(logprobs, old, advantages) * (1 + self.average)


class HoldsALock(Sound):
    def __init__(self):
        self.lock = threading.Lock()


class LosesAnOption(Sound):
    """Comes back from pickle with its default."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def __reduce__(self):
        return LosesAnOption, ()

    def terms(self, logprobs, old, advantages):
        return super().terms(logprobs, old, advantages) * self.scale


BROKEN = {
    "declares_a_denominator": [MeanDenominator, NegativeDenominator],
    "declares_its_needs": [UnknownNeed, UndeclaredNeed],
    "returns_sums": [ReturnsTensor, ReturnsVector, Detached, PlainMetrics, MetricWithGradient],
    "permutation": [WeightedByPlace, CumulativeOverNeighbours],
    "micro_batches": [MeanOfMicroBatch, CentredOnMicroBatch],
    "packing": [CumulativeOverNeighbours, LooksTwoTokensBack],
    "padding": [DividedByLength, DividedByPaddedLength],
    "masked_tokens_have_no_gradient": [LeakingMask],
    "masked_tokens_may_hold_anything": [MasksAfterTheRatio, NanInMetrics],
    "all_masked": [MeanOfSequences, ConstantPenalty],
    "data_parallel": [MeanOfMicroBatch, CentredOnMicroBatch],
    "gradcheck": [StopsTheGradientOfTheRatio, RoundsToFloat32],
    "sign": [WrongSign, AbsoluteAdvantage],
    "ratio_one_step_is_reinforce": [WeightedByProbability, WrongSign],
    "inputs_are_left_alone": [EditsInPlace, AddsAField],
    "metrics_add_up": [MetricsOfMeans, MetricsThatComeAndGo],
    "deterministic": [KeepsAnAverage],
    "process_stays_as_it_is": [SeedsGlobalNumbers],
    "pickles": [HoldsALock, lambda: LosesAnOption(2.0)],
}


def test_a_sound_loss_passes_every_clause():
    report = run_kit(LossContract, Sound)
    assert [result for result in report.results if result.outcome != "passed"] == []


def test_every_clause_has_a_broken_loss():
    assert set(BROKEN) == set(clauses(LossContract))


@pytest.mark.parametrize(("clause", "broken"), [(c, b) for c, many in BROKEN.items() for b in many])
def test_a_broken_loss_fails_its_clause(clause, broken):
    report = run_kit(LossContract, broken, only=[clause])
    assert report.failed == (clause,), report
    assert report.results[0].message
