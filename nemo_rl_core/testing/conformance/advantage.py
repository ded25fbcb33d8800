"""The contract of an advantage estimator.

Each clause is a way in which estimators of the field were wrong: groups found by position instead of by id, a
lone rollout that keeps its raw reward, rounding noise divided by a standard deviation of zero, one bad reward
that spoils a whole batch.
"""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Sequence
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor

from nemo_rl_core.errors import NemoRLError
from nemo_rl_core.protocols.advantage import AdvantageEstimator
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.testing.conformance.frame.kit import Contract
from nemo_rl_core.testing.conformance.frame.process_traces import changes_made_by

__all__ = ["AdvantageContract"]

TOLERANCE = 1e-5
"""Relative to the largest advantage, in float32."""

_GROUPS = (7, 3, 12, 7, 3, 5, 12, 7, 12, 3, 12)
"""Group of each sequence: sizes 3, 3, 4 and 1, interleaved, by names that are no indices."""
_REWARDS = (1.0, 0.0, 0.25, 0.0, 1.0, 1.0, 0.5, 0.3, 0.25, 0.6, 1.0)
_LENGTHS = (5, 3, 7, 4, 6, 5, 3, 8, 4, 6, 5)


class AdvantageContract(Contract):
    """What every advantage estimator must be. Define the fixture `advantage`.

    Attributes:
        baseline: What a reward is compared with. "group": the rollouts of its prompt, so that a group of one and
            a group without variance have no signal and other groups do not matter; "batch": all of the batch;
            "none": nothing, the advantage comes from the sequence alone.
        per_token: Whether the tokens of one sequence may differ (as with a critic).
        counts_forks_once: Whether it reads `rollout_index`, so that a rollout whose history was rewritten into
            several sequences counts once in its group.
        strict: Whether the higher of two rewards always has the higher advantage; False if they may be equal, as
            where only the best of several counts.
    """

    kind: ClassVar[str] = "advantages"
    subject: ClassVar[str] = "advantage"
    baseline: ClassVar[Literal["group", "batch", "none"]] = "group"
    per_token: ClassVar[bool] = False
    counts_forks_once: ClassVar[bool] = False
    strict: ClassVar[bool] = True

    def add_fields(self, batch: BatchedDataDict, generator: torch.Generator) -> None:
        """Add the fields of your own that the estimator reads, in place. Default: nothing.

        The batch has what a run gives: `input_ids, loss_mask, rollout_logprobs` per token and `rewards,
        reward/score, group_ids, rollout_index, weight_version, num_turns, truncated` per sequence.
        """

    # -- clauses -------------------------------------------------------------------------------

    def test_shape_and_dtype(self, advantage: AdvantageEstimator) -> None:
        """It returns a float32 tensor with one number for each token, finite for finite rewards."""
        batch = self._case()
        found = advantage(batch)
        assert isinstance(found, Tensor), f"it returned {type(found).__name__}, not a tensor"
        expected = [batch.num_tokens]
        assert list(found.shape) == expected, f"it returned shape {list(found.shape)}, not [N] = {expected}"
        assert found.dtype == torch.float32, f"it returned {found.dtype}, not float32"
        assert bool(torch.isfinite(found).all()), "it returned nan or inf for ordinary rewards"

    def test_masked_tokens_are_zero(self, advantage: AdvantageEstimator) -> None:
        """It is exactly 0 where `loss_mask` is False, also if a sequence trains nothing, or the whole batch."""
        batch = self._case()
        some = batch["loss_mask"] & (batch.sequence_index != 4)
        for mask, which in ((some, ""), (torch.zeros_like(some), " of a batch in which nothing is trained")):
            batch.set_tokens("loss_mask", mask)
            outside = advantage(batch)[~mask]
            wrong = int((outside != 0).sum())
            assert wrong == 0, f"{wrong} of {outside.numel()} masked tokens{which} have an advantage"

    def test_permutation(self, advantage: AdvantageEstimator) -> None:
        """Sequences in another order get the same advantages, in that order."""
        batch = self._case()
        whole = _by_sequence(advantage, batch)
        for order in (range(len(batch) - 1, -1, -1), (3, 0, 9, 5, 1, 10, 7, 2, 8, 4, 6)):
            moved = _by_sequence(advantage, batch.select(list(order)))
            _same(moved, [whole[i] for i in order], "in another order")

    def test_groups_are_found_by_id(self, advantage: AdvantageEstimator) -> None:
        """A group is the sequences of one id, next to each other or not, and the id is only a name."""
        batch = self._case()
        whole = _by_sequence(advantage, batch)
        together = sorted(range(len(batch)), key=lambda i: _GROUPS[i])
        _same(_by_sequence(advantage, batch.select(together)), [whole[i] for i in together], "with groups together")
        batch.set_sequences("group_ids", 1000 - 3 * batch["group_ids"])
        _same(_by_sequence(advantage, batch), whole, "with other names of the groups")

    def test_group_sizes_may_differ(self, advantage: AdvantageEstimator) -> None:
        """A group gets the same among groups of other sizes as alone."""
        if self.baseline == "batch":
            pytest.skip('declared to compare with the whole batch (baseline = "batch")')
        batch = self._case()
        whole = _by_sequence(advantage, batch)
        for group in dict.fromkeys(_GROUPS):
            members = [i for i, found in enumerate(_GROUPS) if found == group]
            alone = _by_sequence(advantage, batch.select(members))
            _same(alone, [whole[i] for i in members], f"when the group of {len(members)} is alone")

    def test_other_groups_do_not_matter(self, advantage: AdvantageEstimator) -> None:
        """The rewards of a group move no other group."""
        if self.baseline == "batch":
            pytest.skip('declared to compare with the whole batch (baseline = "batch")')
        batch = self._case()
        before = _by_sequence(advantage, batch)
        others = [i for i, group in enumerate(_GROUPS) if group != 12]
        rewards = torch.where(batch["group_ids"] == 12, batch["rewards"].flip(0) * 40 - 3, batch["rewards"])
        after = _by_sequence(advantage, self._with_rewards(batch, rewards))
        _same([after[i] for i in others], [before[i] for i in others], "when another group has other rewards")

    def test_group_of_one(self, advantage: AdvantageEstimator) -> None:
        """A lone rollout has no signal: 0 with a baseline of its group, and finite with any."""
        batch = self._case()
        lone = _GROUPS.index(5)
        for reward in (1.0, 0.0, -3.0):
            rewards = batch["rewards"].clone()
            rewards[lone] = reward
            found = _by_sequence(advantage, self._with_rewards(batch, rewards))[lone]
            assert bool(torch.isfinite(found).all()), f"a lone rollout with reward {reward} has {_first(found)}"
            assert self.baseline != "group" or not found.any(), (
                f"a lone rollout with reward {reward} has advantage {_first(found):.4g}; nothing to compare with is 0"
            )

    def test_zero_variance(self, advantage: AdvantageEstimator) -> None:
        """Equal rewards in a group are no signal: 0, not their rounding noise divided by itself."""
        batch = self._case()
        for value in (0.0, 1.0, 0.1, 1000.1):
            equal = (batch["group_ids"] == 12) | (batch["group_ids"] == 7)  # four and three of them
            rewards = torch.where(equal, torch.tensor(value), batch["rewards"])
            answers = _by_sequence(advantage, self._with_rewards(batch, rewards))
            found = torch.cat([answer for answer, group in zip(answers, _GROUPS, strict=True) if group in (12, 7)])
            assert bool(torch.isfinite(found).all()), f"a group whose rewards are all {value} has nan or inf"
            assert self.baseline != "group" or float(found.abs().max()) < 1e-6, (
                f"a group whose rewards are all {value} has advantages up to {float(found.abs().max()):.4g}"
            )

    def test_better_is_higher(self, advantage: AdvantageEstimator) -> None:
        """In a group a higher reward has a higher advantage, the best above 0 and the worst below."""
        if self.per_token:
            pytest.skip("declared to differ between tokens (per_token = True)")
        batch = self._case()
        strict = self.strict
        found = [_first(a) for a in _by_sequence(advantage, batch)]
        for group in dict.fromkeys(_GROUPS):
            members = sorted((i for i, g in enumerate(_GROUPS) if g == group), key=lambda i: _REWARDS[i])
            for low, high in itertools.pairwise(members):
                ahead = found[high] - found[low]
                wrong = ahead < -TOLERANCE or (strict and _REWARDS[low] < _REWARDS[high] and ahead <= 0)
                assert not wrong, (
                    f"rewards {_REWARDS[low]} and {_REWARDS[high]} of one group have advantages "
                    f"{found[low]:.4g} and {found[high]:.4g}"
                )
            if self.baseline == "group" and len(members) > 1:
                worst, best = found[members[0]], found[members[-1]]
                assert worst < 0 < best, f"worst and best of a group have advantages {worst:.4g} and {best:.4g}"

    def test_bad_rewards_are_contained(self, advantage: AdvantageEstimator) -> None:
        """A reward that is nan or inf is refused by a `NemoRLError`, or stays in its group."""
        batch = self._case()
        before = _by_sequence(advantage, batch)
        spoilt = _GROUPS.index(12)
        for bad in (math.nan, math.inf, -math.inf):
            rewards = batch["rewards"].clone()
            rewards[spoilt] = bad
            try:
                after = _by_sequence(advantage, self._with_rewards(batch, rewards))
            except NemoRLError:
                continue
            except Exception as error:
                raise AssertionError(
                    f"a reward of {bad} raised {type(error).__name__} ({error}); raise a NemoRLError that says which"
                ) from error
            assert self.baseline != "batch", f"a reward of {bad} was not refused, and every group is compared with it"
            others = [i for i, group in enumerate(_GROUPS) if group != 12]
            _same([after[i] for i in others], [before[i] for i in others], f"when another group has a reward of {bad}")

    def test_constant_over_a_sequence(self, advantage: AdvantageEstimator) -> None:
        """All trained tokens of a sequence have one advantage, unless it is declared to differ by token."""
        if self.per_token:
            pytest.skip("declared to differ between tokens (per_token = True)")
        for i, found in enumerate(_by_sequence(advantage, self._case())):
            assert bool((found == found[:1]).all()), f"sequence {i} has advantages {found.tolist()}"

    def test_forks_count_once(self, advantage: AdvantageEstimator) -> None:
        """A rollout that was forked into several sequences counts once in its group."""
        if not self.counts_forks_once:
            pytest.skip("not declared to read `rollout_index` (counts_forks_once = False)")
        batch = self._case()
        before = _by_sequence(advantage, batch)
        order = [*range(len(batch)), 3, 3, 8]
        after = _by_sequence(advantage, batch.select(order))
        _same(after, [before[i] for i in order], "when two rollouts have more than one sequence")

    def test_no_gradient(self, advantage: AdvantageEstimator) -> None:
        """The advantages carry no gradient, also if they are made from per-token fields that do."""
        batch = self._case()
        for name, value in list(batch.tokens.items()):
            if value.is_floating_point():
                batch.set_tokens(name, value.clone().requires_grad_())
        assert not advantage(batch).requires_grad, "they have a gradient: detach them"

    def test_inputs_are_left_alone(self, advantage: AdvantageEstimator) -> None:
        """It changes no field of the batch and adds none."""
        batch = self._case()
        fields = {**batch.tokens, **batch.sequences}
        before = {name: value.clone() for name, value in fields.items()}
        found = advantage(batch)
        found.mul_(0)
        assert batch.field_names == frozenset(before), (
            f"it added or removed {', '.join(sorted(batch.field_names ^ frozenset(before)))}"
        )
        for name, value in before.items():
            assert torch.equal(batch[name], value), f"it changed `{name}`"

    def test_deterministic(self, advantage: AdvantageEstimator) -> None:
        """Called twice it answers the same, bit for bit, whatever was drawn from global random numbers between."""
        batch = self._case()
        first = advantage(batch).clone()
        torch.rand(3)
        assert torch.equal(advantage(batch), first), "the second call gave other advantages"

    def test_process_stays_as_it_is(self, advantage: AdvantageEstimator) -> None:
        """It changes nothing of the process (variables, folder, global random numbers, logging) and prints nothing."""
        batch = self._case()
        found = changes_made_by(lambda: advantage(batch))
        assert not found, f"after a call {'; '.join(found[:3])}: everything else in the process sees that"

    def test_pickles(self, advantage: AdvantageEstimator) -> None:
        """It can be sent to a worker process and is the same there."""
        import cloudpickle

        copy = pickle.loads(cloudpickle.dumps(advantage))
        assert torch.equal(copy(self._case()), advantage(self._case())), "the copy gives other advantages"

    # -- cases ---------------------------------------------------------------------------------

    def _case(self) -> BatchedDataDict:
        generator = torch.Generator().manual_seed(5)
        n = sum(_LENGTHS)
        batch = BatchedDataDict(_LENGTHS, {"input_ids": torch.randint(7, (n,), generator=generator)})
        last = batch.position_ids == batch.lengths[batch.sequence_index] - 1
        sampled = (batch.position_ids > 1) & (torch.rand(n, generator=generator) > 0.2)
        batch.set_tokens("loss_mask", sampled | last)
        batch.set_tokens("rollout_logprobs", -torch.rand(n, generator=generator) * batch["loss_mask"])
        seen: dict[int, int] = {}
        index = [seen.setdefault(g, 0) for g in _GROUPS if seen.update({g: seen.get(g, -1) + 1}) is None]
        batch.set_sequences("group_ids", torch.tensor(_GROUPS))
        batch.set_sequences("rollout_index", torch.tensor(index))
        batch.set_sequences("weight_version", torch.zeros(len(batch), dtype=torch.int64))
        batch.set_sequences("num_turns", torch.ones(len(batch), dtype=torch.int64))
        batch.set_sequences("truncated", torch.tensor([i % 4 == 3 for i in range(len(batch))]))
        self.add_fields(batch, generator)
        return self._with_rewards(batch, torch.tensor(_REWARDS))

    def _with_rewards(self, batch: BatchedDataDict, rewards: Tensor) -> BatchedDataDict:
        """Return the batch with these total rewards [B], also as its only named reward."""
        changed = batch.select(range(len(batch)))
        changed.set_sequences("rewards", rewards.to(torch.float32))
        changed.set_sequences("reward/score", rewards.to(torch.float32).clone())
        return changed


def _by_sequence(advantage: AdvantageEstimator, batch: BatchedDataDict) -> list[Tensor]:
    """Return the advantages [K] of the K trained tokens of each sequence."""
    found = advantage(batch)
    assert isinstance(found, Tensor) and found.shape == (batch.num_tokens,), "it does not return [N] numbers"
    parts = torch.split(found.detach(), batch.lengths.tolist())
    return [part[mask] for part, mask in zip(parts, batch.unpack("loss_mask"), strict=True)]


def _first(values: Tensor) -> float:
    return float(values[0])


def _same(found: Sequence[Tensor], expected: Sequence[Tensor], when: str) -> None:
    """Fail unless the advantages of each sequence, [K] for K trained tokens, are equal within the tolerance."""
    scale = max([float(e.abs().max()) for e in expected if e.numel()] + [1e-6])
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        close = (
            f.shape == e.shape and bool(torch.isfinite(f).all()) and bool(((f - e).abs() <= TOLERANCE * scale).all())
        )
        assert close, f"{when}, sequence {i} has {f.tolist()[:3]} in place of {e.tolist()[:3]}"
