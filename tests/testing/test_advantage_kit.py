"""The contract of an advantage estimator against estimators broken on purpose, one at least for each clause."""

from __future__ import annotations

import threading

import pytest
import torch

from nemo_rl_core.testing import AdvantageContract, run_kit
from nemo_rl_core.testing.conformance.frame.kit import clauses

torch.set_num_threads(1)


class Kit(AdvantageContract):
    """All clauses: the estimators here count a forked rollout once."""

    counts_forks_once = True


class BatchKit(AdvantageContract):
    baseline = "batch"


class Sound:
    """(reward - mean) / std of the group, in steps that a broken estimator replaces."""

    def __call__(self, batch):
        rewards = batch["rewards"].to(torch.float64)
        found = torch.zeros_like(rewards)
        for members in self.groups(batch):
            found[members] = self.of_group(rewards[members], self.counted(batch, members))
        return self.per_token(batch, found)

    def groups(self, batch):
        return [batch["group_ids"] == group for group in batch["group_ids"].unique()]

    def counted(self, batch, members):
        """The first sequence of each rollout."""
        index = batch["rollout_index"][members].tolist()
        return torch.tensor([i not in index[:n] for n, i in enumerate(index)])

    def of_group(self, rewards, counted):
        centred = rewards - rewards[counted].mean()
        std = rewards[counted].std(unbiased=False)
        return centred / (std + 1e-6) if std > 1e-9 * rewards.abs().max() else torch.zeros_like(rewards)

    def per_token(self, batch, found):
        return (batch.expand_to_tokens(found) * batch["loss_mask"]).to(torch.float32)


class Float64(Sound):
    def per_token(self, batch, found):
        return super().per_token(batch, found).double()


class PerSequence(Sound):
    def per_token(self, batch, found):
        return found.float()


class Unmasked(Sound):
    def per_token(self, batch, found):
        return batch.expand_to_tokens(found).float()


class DividedByTrainedTokens(Sound):
    """Scaled by how much of the batch is trained, which may be nothing."""

    def per_token(self, batch, found):
        return super().per_token(batch, found) / batch["loss_mask"].sum() * batch["loss_mask"]


class SeedsGlobalNumbers(Sound):
    """Breaks ties by noise, which is the same each time."""

    def __call__(self, batch):
        torch.manual_seed(0)
        return super().__call__(batch) + 0.0 * torch.rand(())


class OneBaselineForThoseBefore(Sound):
    """A running mean over the batch."""

    def __call__(self, batch):
        rewards = batch["rewards"].double()
        mean = rewards.cumsum(0) / torch.arange(1, len(batch) + 1)
        return self.per_token(batch, rewards - mean)


class NeighboursAreAGroup(Sound):
    def groups(self, batch):
        _, run = torch.unique_consecutive(batch["group_ids"], return_inverse=True)
        return [run == i for i in run.unique()]


class IdsAreNumbers(Sound):
    def of_all(self, batch, found):
        return found * (1 + batch["group_ids"])

    def per_token(self, batch, found):
        return super().per_token(batch, self.of_all(batch, found))


class DividedByTheLargestGroup(Sound):
    def per_token(self, batch, found):
        return super().per_token(batch, found / batch["group_ids"].unique(return_counts=True)[1].max())


class DeviationOfTheBatch(Sound):
    def of_group(self, rewards, counted):
        return rewards - rewards[counted].mean()

    def per_token(self, batch, found):
        return super().per_token(batch, found / (found.std() + 1e-6))


class LoneRolloutKeepsItsReward(Sound):
    def of_group(self, rewards, counted):
        return rewards if len(rewards) == 1 else super().of_group(rewards, counted)


class SampleDeviationOfOne(Sound):
    """The unbiased deviation of a single number is nan."""

    def of_group(self, rewards, counted):
        return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


class RoundingNoise(Sound):
    """In float32, with no epsilon to speak of."""

    def of_group(self, rewards, counted):
        rewards = rewards.float()
        mean = rewards.sum() * (1 / rewards.numel())
        return ((rewards - mean) / ((rewards - mean).square().mean().sqrt() + 1e-12)).double()


class WrongSign(Sound):
    def of_group(self, rewards, counted):
        return -super().of_group(rewards, counted)


class SquaredReward(Sound):
    """Does not keep the order."""

    def of_group(self, rewards, counted):
        return super().of_group((rewards - 0.5).square(), counted)


class SpreadsNan(Sound):
    def per_token(self, batch, found):
        return super().per_token(batch, found + 0 * batch["rewards"].mean())


class RaisesSomething(Sound):
    def __call__(self, batch):
        if not torch.isfinite(batch["rewards"]).all():
            raise KeyError("reward")
        return super().__call__(batch)


class DecaysOverTokens(Sound):
    def per_token(self, batch, found):
        return super().per_token(batch, found) * 0.9**batch.position_ids


class CountsForks(Sound):
    def counted(self, batch, members):
        return torch.ones(int(members.sum()), dtype=torch.bool)


class KeepsTheGradient(Sound):
    def per_token(self, batch, found):
        return super().per_token(batch, found) - 0.1 * batch["rollout_logprobs"] * batch["loss_mask"]


class EditsInPlace(Sound):
    def __call__(self, batch):
        batch["rewards"].sub_(batch["rewards"].mean())
        return super().__call__(batch)


class AddsAField(Sound):
    def __call__(self, batch):
        batch.set_tokens("advantages", super().__call__(batch))
        return batch["advantages"]


class LendsAField(Sound):
    """What the caller does to the result happens to the batch."""

    def __call__(self, batch):
        batch["rollout_logprobs"].copy_(super().__call__(batch))
        return batch["rollout_logprobs"]


class Jitters(Sound):
    def of_group(self, rewards, counted):
        return super().of_group(rewards, counted) * (1 + 1e-3 * torch.rand(()))


class KeepsARunningMean(Sound):
    mean = 0.0

    def of_group(self, rewards, counted):
        self.mean = 0.9 * self.mean + 0.1 * float(rewards.mean())
        return super().of_group(rewards, counted) * (1 + self.mean)


class HoldsALock(Sound):
    def __init__(self):
        self.lock = threading.Lock()


BROKEN = {
    "shape_and_dtype": [Float64, PerSequence, SampleDeviationOfOne],
    "masked_tokens_are_zero": [Unmasked, DividedByTrainedTokens],
    "permutation": [OneBaselineForThoseBefore, NeighboursAreAGroup],
    "groups_are_found_by_id": [NeighboursAreAGroup, IdsAreNumbers],
    "group_sizes_may_differ": [DividedByTheLargestGroup],
    "other_groups_do_not_matter": [DeviationOfTheBatch],
    "group_of_one": [LoneRolloutKeepsItsReward, SampleDeviationOfOne],
    "zero_variance": [RoundingNoise],
    "better_is_higher": [WrongSign, SquaredReward],
    "bad_rewards_are_contained": [SpreadsNan, RaisesSomething],
    "constant_over_a_sequence": [DecaysOverTokens],
    "forks_count_once": [CountsForks],
    "no_gradient": [KeepsTheGradient],
    "inputs_are_left_alone": [EditsInPlace, AddsAField, LendsAField],
    "deterministic": [Jitters, KeepsARunningMean],
    "process_stays_as_it_is": [SeedsGlobalNumbers],
    "pickles": [HoldsALock],
}


def test_a_sound_estimator_passes_every_clause():
    report = run_kit(Kit, Sound)
    assert [result for result in report.results if result.outcome != "passed"] == []


def test_every_clause_has_a_broken_estimator():
    assert set(BROKEN) == set(clauses(AdvantageContract))


@pytest.mark.parametrize(("clause", "broken"), [(c, b) for c, many in BROKEN.items() for b in many])
def test_a_broken_estimator_fails_its_clause(clause, broken):
    report = run_kit(Kit, broken, only=[clause])
    assert report.failed == (clause,), report


class AgainstTheBatch(Sound):
    """Compared with all of the batch, as declared; a bad reward must then be refused."""

    def groups(self, batch):
        return [torch.ones(len(batch), dtype=torch.bool)]

    def counted(self, batch, members):
        return torch.ones(len(batch), dtype=torch.bool)


def test_a_baseline_over_the_batch_is_declared():
    assert "other_groups_do_not_matter" in run_kit(Kit, AgainstTheBatch).failed
    report = run_kit(BatchKit, AgainstTheBatch)
    assert report.failed == ("bad_rewards_are_contained",)
    assert "every group is compared with it" in next(r.message for r in report.results if r.outcome == "failed")
