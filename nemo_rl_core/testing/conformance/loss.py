"""The contract of a loss.

Each clause is a way in which losses of the field were wrong: normalised by the micro-batch, leaking through
the mask, mixing packed neighbours, with the sign turned round. Everything is computed in float64.
"""

from __future__ import annotations

import math
import pickle
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from nemo_rl_core.protocols.loss import Loss, LossSums
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.testing.conformance.cases.loss_case import (
    TOLERANCE,
    FreeModel,
    answer_of,
    answer_on,
    call_loss,
    check_equal,
    check_metrics,
    check_same_when_cut,
    fields_read,
    flat,
    logprob_gradient,
    make_on_policy,
    off_policy_case,
    padded,
    poisoned,
    positions_of,
    reduced,
)
from nemo_rl_core.testing.conformance.frame.kit import Contract
from nemo_rl_core.testing.conformance.frame.process_traces import changes_made_by
from nemo_rl_core.training.model.normalize import NormalizedLoss, count_trained
from nemo_rl_core.training.model.sharding import plan_step

__all__ = ["LossContract"]


class LossContract(Contract):
    """What every loss must be. Define the fixture `loss`; override what your loss sees differently.

    Attributes:
        differentiable: Whether the gradient is that of the value. False for a loss that stops gradients on
            purpose (its `gradcheck` clause is then skipped).
        only_advantages: Whether a loss that reads advantages is moved by nothing else when it is on policy. False
            for one with a further term, such as an entropy or the likelihood of good answers (its
            `ratio_one_step_is_reinforce` clause is then skipped).
    """

    kind: ClassVar[str] = "losses"
    subject: ClassVar[str] = "loss"
    differentiable: ClassVar[bool] = True
    only_advantages: ClassVar[bool] = True

    # -- for losses that need more than the usual fields ---------------------------------------

    def add_fields(self, batch: BatchedDataDict, generator: torch.Generator) -> None:
        """Add the fields of your own that the loss reads, in place. Default: nothing.

        The batch has 6 sequences in 3 groups of 2, with `input_ids, loss_mask, rollout_logprobs, logprobs,
        ref_logprobs, advantages` per token and `rewards, group_ids` per sequence. A loss that needs "top_logprobs"
        adds `top_ids` [N, ...], ids below 7.
        """

    def units(self, batch: BatchedDataDict, loss: Loss) -> list[list[int]]:
        """Sequences that must stay together in a micro-batch. Default: what `loss.unit` says."""
        if getattr(loss, "unit", "sequence") != "group":
            return [[i] for i in range(len(batch))]
        members: dict[int, list[int]] = {}
        for position, group in enumerate(batch["group_ids"].tolist()):
            members.setdefault(group, []).append(position)
        return list(members.values())

    def wanted(self, batch: BatchedDataDict, reads: frozenset[str]) -> Tensor:
        """[N] +1 where the loss must raise a token's logprob, -1 where it must lower it, 0 where neither.

        Default: the sign of the advantages if the loss reads them; up for chosen and down for rejected sequences if
        it reads `is_chosen`; else +1 at every trained token.
        """
        direction = torch.ones(batch.num_tokens)
        if "advantages" in reads:
            direction = batch["advantages"].sign()
        elif "is_chosen" in reads:
            direction = batch.expand_to_tokens(batch["is_chosen"].to(torch.float64) * 2 - 1)
        wanted: Tensor = (direction * batch["loss_mask"]).to(torch.float64)
        return wanted

    # -- clauses -------------------------------------------------------------------------------

    def test_declares_a_denominator(self, loss: Loss) -> None:
        """It declares what its sum is divided by: "tokens", "sequences", "groups" or a positive number."""
        found = getattr(loss, "denominator", None)
        known = found in ("tokens", "sequences", "groups")
        number = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found) and found > 0
        assert known or number, f"denominator is {found!r}"

    def test_declares_its_needs(self, loss: Loss) -> None:
        """It declares in `needs` which model outputs it reads, and reads no other."""
        known = {"logprobs", "entropy", "logits", "top_logprobs", "over_vocabulary", "values"}
        assert set(loss.needs) <= known, f"needs has {sorted(set(loss.needs) - known)}; allowed: {sorted(known)}"
        batch, model = self._case()
        answer_of(loss, batch, model)

    def test_returns_sums(self, loss: Loss) -> None:
        """It returns `LossSums` with a scalar that has a gradient, and metrics that are `Metric`s of scalars."""
        batch, model = self._case()
        sums = call_loss(loss, batch, *model.leaves())
        assert isinstance(sums, LossSums), f"it returned {type(sums).__name__}"
        assert sums.total.shape == (), f"total has shape {list(sums.total.shape)}, not []"
        assert sums.total.requires_grad, "total has no gradient"
        check_metrics(sums.metrics)

    def test_permutation(self, loss: Loss) -> None:
        """The order of the sequences changes neither value nor gradient."""
        batch, model = self._case()
        units = self.units(batch, loss)
        order = [i for unit in reversed(units) for i in unit]
        check_same_when_cut(loss, batch, model, [order])

    def test_micro_batches(self, loss: Loss) -> None:
        """The sums of any cut into micro-batches add up to the whole, value and gradient."""
        batch, model = self._case()
        units = self.units(batch, loss)
        for size in (1, 2):
            check_same_when_cut(loss, batch, model, [flat(units[i : i + size]) for i in range(0, len(units), size)])

    def test_packing(self, loss: Loss) -> None:
        """A sequence counts alike alone and packed between others: nothing crosses the border."""
        batch, model = self._case()
        units = self.units(batch, loss)
        alone = [answer_on(loss, batch, model, unit) for unit in units]
        for first in range(len(units)):
            neighbours = [units[first], units[(first + 1) % len(units)]]
            together = answer_on(loss, batch, model, flat(neighbours))
            check_equal(together.total, alone[first].total + alone[(first + 1) % len(units)].total, "value of a pack")
            grads = torch.cat([alone[first].logits_grad, alone[(first + 1) % len(units)].logits_grad])
            check_equal(together.logits_grad, grads, "gradient of a pack")

    def test_padding(self, loss: Loss) -> None:
        """Untrained tokens at the end of sequences, whatever stands there, change neither value nor gradient."""
        batch, model = self._case()
        wide, wide_model, positions = padded(batch, model)
        plain, longer = answer_of(loss, batch, model), answer_of(loss, wide, wide_model)
        check_equal(longer.total, plain.total, "value")
        check_equal(longer.logits_grad[positions], plain.logits_grad, "gradient")

    def test_masked_tokens_have_no_gradient(self, loss: Loss) -> None:
        """Tokens outside `loss_mask` get a gradient of exactly 0; the value of a state also next to a trained token.

        The value of the state before a trained token is the output at the token before it, which may be masked.
        """
        batch, model = self._case()
        answer = answer_of(loss, batch, model)
        outside = ~batch["loss_mask"]
        follows = torch.cat([batch["loss_mask"][1:], torch.zeros(1, dtype=torch.bool)])
        follows &= batch.position_ids < batch.lengths[batch.sequence_index] - 1
        leaked = (answer.logits_grad[outside] != 0).any(-1).sum() + (answer.values_grad[outside & ~follows] != 0).sum()
        assert int(leaked) == 0, f"{int(leaked)} of {int(outside.sum())} masked tokens have a gradient"

    def test_masked_tokens_may_hold_anything(self, loss: Loss) -> None:
        """Inf and nan in the batch's fields at masked positions reach neither value nor gradient nor metrics."""
        batch, model = self._case()
        plain = answer_of(loss, batch, model)
        for poison in (math.nan, math.inf):
            answer = answer_of(loss, poisoned(batch, poison), model)
            check_equal(answer.total, plain.total, f"value with {poison} in masked positions")
            check_equal(answer.logits_grad, plain.logits_grad, f"gradient with {poison} in masked positions")
            check_metrics(answer.sums.metrics)

    def test_all_masked(self, loss: Loss) -> None:
        """With nothing to train the sum is 0, the gradient is 0, and nothing is nan."""
        batch, model = self._case()
        batch.set_tokens("loss_mask", torch.zeros_like(batch["loss_mask"]))
        answer = answer_of(loss, batch, model)
        assert float(answer.total) == 0.0, f"the sum is {float(answer.total)}"
        assert not answer.logits_grad.any() and not answer.values_grad.any(), "there is a gradient"
        check_metrics(answer.sums.metrics, empty=True)

    def test_data_parallel(self, loss: Loss) -> None:
        """Divided by the global count, two ranks take the step of one: value and gradient."""
        batch, model = self._case()
        units = self.units(batch, loss)
        sizes = [int(sum(batch.lengths[i] for i in unit)) for unit in units]
        counts = count_trained(batch)
        whole = answer_of(NormalizedLoss(loss, counts), batch, model)
        total, grad = torch.zeros((), dtype=torch.float64), torch.zeros_like(model.logits)
        for plan in plan_step(sizes, num_shards=2, token_budget=max(sizes)):
            for cut in plan.micro_batches:
                indices = flat(units[plan.indices[i]] for i in cut)
                part = answer_on(NormalizedLoss(loss, counts), batch, model, indices)
                total += part.total
                grad[positions_of(batch, indices)] += part.logits_grad
        check_equal(total, whole.total, "value")
        check_equal(grad, whole.logits_grad, "gradient")

    def test_gradcheck(self, loss: Loss) -> None:
        """Its gradient is that of its value, by finite differences in float64."""
        if not self.differentiable:
            pytest.skip("declared to stop gradients on purpose")
        batch, model = self._case()
        logits, values = model.leaves()
        assert torch.autograd.gradcheck(
            lambda x, v: call_loss(loss, batch, x, v).total, (logits, values), atol=1e-5, rtol=1e-3, fast_mode=True
        )

    def test_sign(self, loss: Loss) -> None:
        """A descent step raises what is to be raised: positive advantages, likely labels (see `wanted`)."""
        batch, model = self._on_policy_case()
        reads = fields_read(loss, batch, model)
        direction = self.wanted(batch, reads)
        if "logprobs" not in loss.needs or not direction.any():
            pytest.skip("it does not train through logprobs; override `wanted` to have the sign tested")
        grad = logprob_gradient(loss, batch, model)
        along = grad * direction
        assert float(along.sum()) < 0, f"the loss rises by {float(along.sum()):.3g} along the wanted direction"
        wrong = int((along > TOLERANCE).sum())
        assert wrong == 0, f"{wrong} trained tokens are pushed the wrong way"

    def test_ratio_one_step_is_reinforce(self, loss: Loss) -> None:
        """On policy (all ratios 1) the gradient of each token is proportional to -advantage, as in REINFORCE."""
        if not self.only_advantages:
            pytest.skip("declared to have a further term beside the advantages (only_advantages = False)")
        batch, model = self._on_policy_case()
        if "advantages" not in fields_read(loss, batch, model) or "logprobs" not in loss.needs:
            pytest.skip("it reads no advantages")
        grad, mask = logprob_gradient(loss, batch, model), batch["loss_mask"]
        for i, (g, a, m) in enumerate(
            zip(*(torch.split(t, batch.lengths.tolist()) for t in (grad, batch["advantages"], mask)), strict=True)
        ):
            weight = -g[m] / a[m]
            assert bool((weight > 0).all()), f"sequence {i}: gradient and advantage have the same sign"
            check_equal(weight, weight[:1].expand_as(weight), f"weights of the tokens of sequence {i}")

    def test_inputs_are_left_alone(self, loss: Loss) -> None:
        """It changes no field of the batch."""
        batch, model = self._case()
        before = {name: value.clone() for name, value in batch.tokens.items()}
        before_rows = {name: value.clone() for name, value in batch.sequences.items() if isinstance(value, Tensor)}
        answer_of(loss, batch, model)
        for name, value in {**before, **before_rows}.items():
            assert torch.equal(batch[name], value), f"it changed `{name}`"
        assert batch.field_names == {*before, *batch.sequences}, "it added or removed a field"

    def test_metrics_add_up(self, loss: Loss) -> None:
        """Metrics of micro-batches reduce to those of the whole batch."""
        batch, model = self._case()
        whole = reduced([answer_of(loss, batch, model).sums.metrics])
        parts = reduced([answer_on(loss, batch, model, unit).sums.metrics for unit in self.units(batch, loss)])
        assert whole.keys() == parts.keys(), f"names differ: {sorted(whole.keys() ^ parts.keys())}"
        for name, value in whole.items():
            assert math.isclose(parts[name], value, rel_tol=1e-5, abs_tol=1e-7), (
                f"`{name}` is {value:.6g} for the whole batch and {parts[name]:.6g} from its parts"
            )

    def test_deterministic(self, loss: Loss) -> None:
        """Called twice it answers the same, bit for bit: it keeps no state between micro-batches."""
        batch, model = self._case()
        first, second = answer_of(loss, batch, model), answer_of(loss, batch, model)
        assert torch.equal(first.total, second.total), "the second call gave another value"
        assert torch.equal(first.logits_grad, second.logits_grad), "the second call gave another gradient"

    def test_process_stays_as_it_is(self, loss: Loss) -> None:
        """It changes nothing of the process (variables, folder, global random numbers, logging) and prints nothing."""
        batch, model = self._case()
        found = changes_made_by(lambda: answer_of(loss, batch, model))
        assert not found, f"after a call {'; '.join(found[:3])}: everything else in the process sees that"

    def test_pickles(self, loss: Loss) -> None:
        """It can be sent to a worker process and is the same there."""
        import cloudpickle

        batch, model = self._case()
        copy = pickle.loads(cloudpickle.dumps(loss))
        assert copy.denominator == loss.denominator, "the denominator was lost"
        check_equal(answer_of(copy, batch, model).total, answer_of(loss, batch, model).total, "value of the copy")

    # -- cases ---------------------------------------------------------------------------------

    def _case(self) -> tuple[BatchedDataDict, FreeModel]:
        batch, model, generator = off_policy_case()
        self.add_fields(batch, generator)
        return batch, model

    def _on_policy_case(self) -> tuple[BatchedDataDict, FreeModel]:
        batch, model = self._case()
        make_on_policy(batch, model)
        return batch, model
