"""The kit of algorithms, tried on algorithms that are broken in one thing each."""

from __future__ import annotations

import random

import pytest
import torch
from attrs import evolve, frozen

from nemo_rl_core.protocols.algorithm import ModelRole, Update
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.testing import AlgorithmContract, run_kit
from nemo_rl_core.testing.conformance.frame.kit import clauses
from nemo_rl_plugins_grpo.algorithm import GRPO
from nemo_rl_plugins_grpo.config import GRPOConfig
from nemo_rl_plugins_sft.algorithm import SFT


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def batching(change, base=GRPO):
    """An algorithm whose batches are changed: `change(batch)`, in place or another."""

    class Algorithm(base):
        def build_batch(self, items):
            batch = super().build_batch(items)
            return change(batch) or batch

    return Algorithm


def finishing(change, base=GRPO):
    """An algorithm whose finished batches are changed in place: `change(batch)`, which may return metrics."""

    class Algorithm(base):
        def finish_batch(self, batch):
            metrics = super().finish_batch(batch)
            return {**metrics, **(change(batch) or {})}

    return Algorithm


def cutting(change):
    """An algorithm with other minibatches: `change(number of sequences)`."""

    class Algorithm(GRPO):
        def minibatches(self, batch):
            return change(len(batch))

    return Algorithm


class NoRunConfig(GRPO):
    @frozen(kw_only=True)
    class config_class:
        algorithm: str = "grpo"


@frozen(kw_only=True)
class NoGroups(GRPOConfig):
    @property
    def group_size(self):
        return 0


class EmptyGroups(GRPO):
    config_class = NoGroups


class Lenient(GRPO):
    """Its configuration takes what it does not know."""

    @frozen(kw_only=True)
    class config_class(GRPOConfig):
        num_promts_per_stepp: int = 1


class Fed(GRPO):
    feed = "spoon"


class Roles(GRPO):
    @property
    def models(self):
        return {"oracle": "a model"}


class PolicyAsRole(GRPO):
    @property
    def models(self):
        return {"policy": ModelRole(config=self.config.policy)}


class NoUpdates(GRPO):
    def updates(self, batch):
        return []


class UpdatesOfAFrozenModel(GRPO):
    @property
    def models(self):
        return {"critic": ModelRole(config=self.config.policy)}

    def updates(self, batch):
        return [*super().updates(batch), Update(range(len(batch)), self.loss, "critic")]


class UpdatesBeyondTheBatch(GRPO):
    def updates(self, batch):
        return [Update(range(len(batch) + 1), self.loss)]


class Fields(GRPO):
    required_fields = frozenset({"values"})


class ReferenceWithoutRole(GRPO):
    required_fields = frozenset({"ref_logprobs"})

    @property
    def models(self):
        return {}


class UndeclaredLoss(GRPO):
    def __init__(self, config, context):
        super().__init__(config, context)
        self.loss = lambda outputs, batch: outputs.logprobs.sum()


def without(*names):
    def change(batch):
        tokens = {name: value for name, value in batch.tokens.items() if name not in names}
        sequences = {name: value for name, value in batch.sequences.items() if name not in names}
        return BatchedDataDict(batch.lengths, tokens, sequences)

    return change


def set_mask(make):
    def change(batch):
        batch.set_tokens("loss_mask", make(batch))

    return change


def first_tokens_too(batch):
    return batch["loss_mask"] | (batch.position_ids == 0)


def everything(batch):
    return batch.position_ids > 0


def not_the_last(batch):
    """The end-of-sequence token is never learned."""
    last = batch.position_ids == batch.lengths[batch.sequence_index] - 1
    return batch["loss_mask"] & ~last


class WithFailures(GRPO):
    """Trains on rollouts that failed."""

    def build_batch(self, items):
        for group in items:
            for rollout in group.rollouts:
                rollout.error = None
        return super().build_batch(items)


def shift_logprobs(batch):
    """Off by one token."""
    batch.set_tokens("rollout_logprobs", batch["rollout_logprobs"].roll(1))


def one_group(batch):
    batch.set_sequences("group_ids", torch.zeros(len(batch), dtype=torch.int64))


def spread_advantages(batch):
    batch.set_tokens("advantages", torch.ones(batch.num_tokens))


def nan_advantages(batch):
    batch.set_tokens("advantages", batch["advantages"].masked_fill(batch["loss_mask"], float("nan")))


class Moody(GRPO):
    """Keeps every other group."""

    asked = 0

    def keep_group(self, group):
        self.asked += 1
        return self.asked % 2 == 0


class Marks(GRPO):
    def keep_group(self, group):
        group.rollouts[0].info["seen"] = True
        return True


class AnswersOddly(GRPO):
    def keep_group(self, group):
        return group.rewards


class Consumes(GRPO):
    def build_batch(self, items):
        batch = super().build_batch(items)
        for group in items:
            group.rollouts[0].rewards.clear()
        return batch


class Shuffles(GRPO):
    def build_batch(self, items):
        batch = super().build_batch(items)
        return batch.select(torch.randperm(len(batch)))


def backwards(batch):
    batch.set_tokens("advantages", -batch["advantages"])


def no_advantages(batch):
    batch.set_tokens("advantages", torch.zeros(batch.num_tokens))


def nothing(batch):
    batch.set_tokens("loss_mask", torch.zeros_like(batch["loss_mask"]))


class Counts(GRPO):
    """Keeps a state of its own, which no checkpoint holds."""

    steps = 0

    def finish_batch(self, batch):
        metrics = super().finish_batch(batch)
        self.steps += 1
        batch.set_tokens("advantages", batch["advantages"] / self.steps)
        return metrics


class Unseeded(SFT):
    """Draws from a generator of its own."""

    def build_batch(self, items):
        batch = super().build_batch(items)
        keep = torch.tensor([random.SystemRandom().random() > 0.2 for _ in range(batch.num_tokens)])
        batch.set_tokens("loss_mask", batch["loss_mask"] & keep)
        return batch


class PerMicroBatch:
    """A loss that divides by what it sees: its sum depends on the micro-batches."""

    denominator = 1.0

    def __init__(self, loss):
        self.loss, self.needs = loss, loss.needs

    def __call__(self, outputs, batch):
        sums = self.loss(outputs, batch)
        return evolve(sums, total=sums.total / max(int(batch["loss_mask"].sum()), 1))


def losing(wrap, base=GRPO):
    class Algorithm(base):
        def __init__(self, config, context):
            super().__init__(config, context)
            self.loss = wrap(self.loss)

    return Algorithm


class OffPolicy:
    """Takes the logprobs for those of another temperature."""

    def __init__(self, loss):
        self.loss, self.needs, self.denominator = loss, loss.needs, loss.denominator

    def __call__(self, outputs, batch):
        return self.loss(evolve(outputs, logprobs=outputs.logprobs * 0.9), batch)


BROKEN = {
    "config": (NoRunConfig, EmptyGroups),
    "config_mistakes": (Lenient,),
    "declares_itself": (Fed, Roles, PolicyAsRole, Fields, ReferenceWithoutRole, UndeclaredLoss),
    "batch_fields": (
        batching(without("rewards")),
        batching(without("group_ids")),
        batching(without("rollout_logprobs")),
        batching(set_mask(first_tokens_too), SFT),
        batching(set_mask(lambda batch: batch["loss_mask"].long()), SFT),
        batching(nothing, SFT),
    ),
    "trained_tokens": (
        batching(set_mask(everything)),
        batching(set_mask(not_the_last)),
        batching(set_mask(everything), SFT),
        batching(set_mask(lambda batch: batch["loss_mask"] & (batch.position_ids % 2 == 0)), SFT),
        batching(set_mask(not_the_last), SFT),
        batching(lambda batch: batch.select(range(len(batch) - 1)), SFT),
    ),
    "batch_of_rollouts": (
        WithFailures,
        batching(lambda batch: batch.select(range(len(batch) - 1))),
        batching(shift_logprobs),
        batching(one_group),
    ),
    "finish_batch": (
        finishing(spread_advantages),
        finishing(nan_advantages),
        finishing(lambda batch: {"share": float("nan")}),
        finishing(set_mask(everything)),
        finishing(set_mask(everything), SFT),
    ),
    "minibatches": (
        cutting(lambda n: [range(n - 1)]),
        cutting(lambda n: [[*range(n), 0]]),
        cutting(lambda n: [range(n // 2), range(n // 2, n)]),
        cutting(lambda n: [range(n + 1)]),
    ),
    "updates": (NoUpdates, UpdatesOfAFrozenModel, UpdatesBeyondTheBatch),
    "keep_group": (Moody, Marks, AnswersOddly),
    "items_are_left_alone": (Consumes, Shuffles),
    "learns": (
        finishing(backwards),
        finishing(no_advantages),
        batching(nothing, SFT),
    ),
    "first_step_is_on_policy": (losing(OffPolicy), batching(shift_logprobs)),
    "resumes": (Counts, Unseeded),
    "micro_batches": (losing(PerMicroBatch), losing(PerMicroBatch, SFT)),
}


def test_a_broken_algorithm_is_there_for_each_clause():
    assert set(BROKEN) == set(clauses(AlgorithmContract))


@pytest.mark.parametrize(("clause", "broken"), [(c, b) for c, algorithms in BROKEN.items() for b in algorithms])
def test_a_broken_algorithm_is_caught(clause, broken):
    (result,) = run_kit(AlgorithmContract, lambda: broken, only=[clause]).results
    assert result.outcome == "failed", f"{broken.__name__} passes {clause}"
    assert result.message
