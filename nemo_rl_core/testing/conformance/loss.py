"""The contract of a loss.

Each clause is a way in which losses of the field were wrong: normalised by the micro-batch, leaking through
the mask, mixing packed neighbours, with the sign turned round. Everything is computed in float64.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from attrs import frozen
from torch import Tensor

from nemo_rl_core.data.batch import BatchedDataDict
from nemo_rl_core.data.sharding import plan_step
from nemo_rl_core.protocols.loss import Loss, LossSums, Metric, ModelOutputs
from nemo_rl_core.testing.conformance.kit import Contract
from nemo_rl_core.training.normalize import NormalizedLoss, count_trained

__all__ = ["LossContract"]

VOCABULARY = 7
TOLERANCE = 1e-9
"""Relative, of values and gradients in float64."""


@frozen(eq=False)
class _Model:
    """What stands for the policy: free logits and values, so that gradients are per token."""

    logits: Tensor
    """[N, V] float64."""
    values: Tensor
    """[N] float64."""

    def select(self, positions: Tensor) -> _Model:
        """The same numbers at these tokens, as new leaves."""
        return _Model(self.logits[positions], self.values[positions])

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.logits.detach().clone().requires_grad_(), self.values.detach().clone().requires_grad_()


@frozen(eq=False)
class _Answer:
    """A loss sum and its gradient by token."""

    total: Tensor
    logits_grad: Tensor
    values_grad: Tensor
    sums: LossSums


class LossContract(Contract):
    """What every loss must be. Define the fixture `loss`; override what your loss sees differently.

    Attributes:
        differentiable: Whether the gradient is that of the value. False for a loss that stops gradients on
            purpose (its `gradcheck` clause is then skipped); the loss may also say so itself, by an attribute
            `conformance` that is `{"differentiable": False}`.
    """

    kind: ClassVar[str] = "losses"
    subject: ClassVar[str] = "loss"
    differentiable: ClassVar[bool] = True

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
        known = {"logprobs", "entropy", "logits", "top_logprobs", "values"}
        assert set(loss.needs) <= known, f"needs has {sorted(set(loss.needs) - known)}; allowed: {sorted(known)}"
        batch, model = self._case()
        _answer(loss, batch, model)

    def test_returns_sums(self, loss: Loss) -> None:
        """It returns `LossSums` with a scalar that has a gradient, and metrics that are `Metric`s of scalars."""
        batch, model = self._case()
        sums = _call(loss, batch, *model.leaves())
        assert isinstance(sums, LossSums), f"it returned {type(sums).__name__}"
        assert sums.total.shape == (), f"total has shape {list(sums.total.shape)}, not []"
        assert sums.total.requires_grad, "total has no gradient"
        _check_metrics(sums.metrics)

    def test_permutation(self, loss: Loss) -> None:
        """The order of the sequences changes neither value nor gradient."""
        batch, model = self._case()
        units = self.units(batch, loss)
        order = [i for unit in reversed(units) for i in unit]
        self._same_when_cut(loss, batch, model, [order])

    def test_micro_batches(self, loss: Loss) -> None:
        """The sums of any cut into micro-batches add up to the whole, value and gradient."""
        batch, model = self._case()
        units = self.units(batch, loss)
        for size in (1, 2):
            self._same_when_cut(loss, batch, model, [_flat(units[i : i + size]) for i in range(0, len(units), size)])

    def test_packing(self, loss: Loss) -> None:
        """A sequence counts alike alone and packed between others: nothing crosses the border."""
        batch, model = self._case()
        units = self.units(batch, loss)
        alone = [_on(loss, batch, model, unit) for unit in units]
        for first in range(len(units)):
            neighbours = [units[first], units[(first + 1) % len(units)]]
            together = _on(loss, batch, model, _flat(neighbours))
            _equal(together.total, alone[first].total + alone[(first + 1) % len(units)].total, "value of a pack")
            grads = torch.cat([alone[first].logits_grad, alone[(first + 1) % len(units)].logits_grad])
            _equal(together.logits_grad, grads, "gradient of a pack")

    def test_padding(self, loss: Loss) -> None:
        """Untrained tokens at the end of sequences, whatever stands there, change neither value nor gradient."""
        batch, model = self._case()
        wide, wide_model, positions = _padded(batch, model)
        plain, padded = _answer(loss, batch, model), _answer(loss, wide, wide_model)
        _equal(padded.total, plain.total, "value")
        _equal(padded.logits_grad[positions], plain.logits_grad, "gradient")

    def test_masked_tokens_have_no_gradient(self, loss: Loss) -> None:
        """Tokens outside `loss_mask` get a gradient of exactly 0; the value of a state also next to a trained token.

        The value of the state before a trained token is the output at the token before it, which may be masked.
        """
        batch, model = self._case()
        answer = _answer(loss, batch, model)
        outside = ~batch["loss_mask"]
        follows = torch.cat([batch["loss_mask"][1:], torch.zeros(1, dtype=torch.bool)])
        follows &= batch.position_ids < batch.lengths[batch.sequence_index] - 1
        leaked = (answer.logits_grad[outside] != 0).any(-1).sum() + (answer.values_grad[outside & ~follows] != 0).sum()
        assert int(leaked) == 0, f"{int(leaked)} of {int(outside.sum())} masked tokens have a gradient"

    def test_masked_tokens_may_hold_anything(self, loss: Loss) -> None:
        """Inf and nan in the batch's fields at masked positions reach neither value nor gradient nor metrics."""
        batch, model = self._case()
        plain = _answer(loss, batch, model)
        for poison in (math.nan, math.inf):
            answer = _answer(loss, _poisoned(batch, poison), model)
            _equal(answer.total, plain.total, f"value with {poison} in masked positions")
            _equal(answer.logits_grad, plain.logits_grad, f"gradient with {poison} in masked positions")
            _check_metrics(answer.sums.metrics)

    def test_all_masked(self, loss: Loss) -> None:
        """With nothing to train the sum is 0, the gradient is 0, and nothing is nan."""
        batch, model = self._case()
        batch.set_tokens("loss_mask", torch.zeros_like(batch["loss_mask"]))
        answer = _answer(loss, batch, model)
        assert float(answer.total) == 0.0, f"the sum is {float(answer.total)}"
        assert not answer.logits_grad.any() and not answer.values_grad.any(), "there is a gradient"
        _check_metrics(answer.sums.metrics, empty=True)

    def test_data_parallel(self, loss: Loss) -> None:
        """Divided by the global count, two ranks take the step of one: value and gradient."""
        batch, model = self._case()
        units = self.units(batch, loss)
        sizes = [int(sum(batch.lengths[i] for i in unit)) for unit in units]
        counts = count_trained(batch)
        whole = _answer(NormalizedLoss(loss, counts), batch, model)
        total, grad = torch.zeros((), dtype=torch.float64), torch.zeros_like(model.logits)
        for plan in plan_step(sizes, num_shards=2, token_budget=max(sizes)):
            for cut in plan.micro_batches:
                indices = _flat(units[plan.indices[i]] for i in cut)
                part = _on(NormalizedLoss(loss, counts), batch, model, indices)
                total += part.total
                grad[_positions(batch, indices)] += part.logits_grad
        _equal(total, whole.total, "value")
        _equal(grad, whole.logits_grad, "gradient")

    def test_gradcheck(self, loss: Loss) -> None:
        """Its gradient is that of its value, by finite differences in float64."""
        if not getattr(loss, "conformance", {}).get("differentiable", self.differentiable):
            pytest.skip("declared to stop gradients on purpose")
        batch, model = self._case()
        logits, values = model.leaves()
        assert torch.autograd.gradcheck(
            lambda x, v: _call(loss, batch, x, v).total, (logits, values), atol=1e-5, rtol=1e-3, fast_mode=True
        )

    def test_sign(self, loss: Loss) -> None:
        """A descent step raises what is to be raised: positive advantages, likely labels (see `wanted`)."""
        batch, model = self._on_policy_case()
        reads = _reads(loss, batch, model)
        direction = self.wanted(batch, reads)
        if "logprobs" not in loss.needs or not direction.any():
            pytest.skip("it does not train through logprobs; override `wanted` to have the sign tested")
        grad = _logprob_gradient(loss, batch, model)
        along = grad * direction
        assert float(along.sum()) < 0, f"the loss rises by {float(along.sum()):.3g} along the wanted direction"
        wrong = int((along > TOLERANCE).sum())
        assert wrong == 0, f"{wrong} trained tokens are pushed the wrong way"

    def test_ratio_one_step_is_reinforce(self, loss: Loss) -> None:
        """On policy (all ratios 1) the gradient of each token is proportional to -advantage, as in REINFORCE."""
        batch, model = self._on_policy_case()
        if "advantages" not in _reads(loss, batch, model) or "logprobs" not in loss.needs:
            pytest.skip("it reads no advantages")
        grad, mask = _logprob_gradient(loss, batch, model), batch["loss_mask"]
        for i, (g, a, m) in enumerate(
            zip(*(torch.split(t, batch.lengths.tolist()) for t in (grad, batch["advantages"], mask)), strict=True)
        ):
            weight = -g[m] / a[m]
            assert bool((weight > 0).all()), f"sequence {i}: gradient and advantage have the same sign"
            _equal(weight, weight[:1].expand_as(weight), f"weights of the tokens of sequence {i}")

    def test_inputs_are_left_alone(self, loss: Loss) -> None:
        """It changes no field of the batch."""
        batch, model = self._case()
        before = {name: value.clone() for name, value in batch.tokens.items()}
        before_rows = {name: value.clone() for name, value in batch.sequences.items() if isinstance(value, Tensor)}
        _answer(loss, batch, model)
        for name, value in {**before, **before_rows}.items():
            assert torch.equal(batch[name], value), f"it changed `{name}`"
        assert batch.field_names == {*before, *batch.sequences}, "it added or removed a field"

    def test_metrics_add_up(self, loss: Loss) -> None:
        """Metrics of micro-batches reduce to those of the whole batch."""
        batch, model = self._case()
        whole = _reduced([_answer(loss, batch, model).sums.metrics])
        parts = _reduced([_on(loss, batch, model, unit).sums.metrics for unit in self.units(batch, loss)])
        assert whole.keys() == parts.keys(), f"names differ: {sorted(whole.keys() ^ parts.keys())}"
        for name, value in whole.items():
            assert math.isclose(parts[name], value, rel_tol=1e-5, abs_tol=1e-7), (
                f"`{name}` is {value:.6g} for the whole batch and {parts[name]:.6g} from its parts"
            )

    def test_deterministic(self, loss: Loss) -> None:
        """Called twice it answers the same, bit for bit: it keeps no state between micro-batches."""
        batch, model = self._case()
        first, second = _answer(loss, batch, model), _answer(loss, batch, model)
        assert torch.equal(first.total, second.total), "the second call gave another value"
        assert torch.equal(first.logits_grad, second.logits_grad), "the second call gave another gradient"

    def test_pickles(self, loss: Loss) -> None:
        """It can be sent to a worker process and is the same there."""
        import cloudpickle

        batch, model = self._case()
        copy = pickle.loads(cloudpickle.dumps(loss))
        assert copy.denominator == loss.denominator, "the denominator was lost"
        _equal(_answer(copy, batch, model).total, _answer(loss, batch, model).total, "value of the copy")

    # -- cases ---------------------------------------------------------------------------------

    def _case(self) -> tuple[BatchedDataDict, _Model]:
        """Off policy: current, old, sampling and reference policies differ by a few per cent."""
        generator = torch.Generator().manual_seed(11)
        lengths = [5, 3, 8, 4, 6, 7]
        n = sum(lengths)
        model = _Model(
            torch.randn(n, VOCABULARY, generator=generator, dtype=torch.float64),
            torch.randn(n, generator=generator, dtype=torch.float64),
        )
        batch = BatchedDataDict(lengths, {"input_ids": torch.randint(VOCABULARY, (n,), generator=generator)})
        starts = batch.position_ids
        mask = (starts > 0) & ((starts > 1) | (batch.sequence_index % 2 == 0))
        mask &= torch.rand(n, generator=generator) > 0.15
        batch.set_tokens("loss_mask", mask | (starts == batch.lengths[batch.sequence_index] - 1))
        current = _logprobs(batch, model.logits)
        for name, spread in (("logprobs", 0.05), ("rollout_logprobs", 0.07), ("ref_logprobs", 0.3)):
            noise = torch.randn(n, generator=generator, dtype=torch.float64)
            batch.set_tokens(name, (current + spread * noise) * (starts > 0))
        rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 1.0], dtype=torch.float64)
        advantages = batch.expand_to_tokens(torch.tensor([1.0, -1.2, -0.7, 0.9, -1.1, 1.3], dtype=torch.float64))
        batch.set_tokens("advantages", advantages * (0.5 + torch.rand(n, generator=generator, dtype=torch.float64)))
        batch.set_sequences("rewards", rewards)
        batch.set_sequences("group_ids", torch.tensor([0, 0, 1, 1, 2, 2]))
        batch.set_sequences("is_chosen", torch.tensor([True, False] * 3))
        batch.set_sequences("margins", torch.tensor([0.5, 0.5, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64))
        for name in ("values", "returns"):
            batch.set_tokens(name, model.values + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64))
        self.add_fields(batch, generator)
        return batch, model

    def _on_policy_case(self) -> tuple[BatchedDataDict, _Model]:
        """The four policies are equal, and the advantage is one number for each sequence."""
        batch, model = self._case()
        current = _logprobs(batch, model.logits).detach()
        for name in ("logprobs", "rollout_logprobs", "ref_logprobs"):
            batch.set_tokens(name, current.clone())
        per_sequence = torch.tensor([1.0, -1.2, -0.7, 0.9, -1.1, 1.3], dtype=torch.float64)
        batch.set_tokens("advantages", batch.expand_to_tokens(per_sequence))
        return batch, model

    def _same_when_cut(self, loss: Loss, batch: BatchedDataDict, model: _Model, cuts: Sequence[Sequence[int]]) -> None:
        whole = _answer(loss, batch, model)
        total, grad = torch.zeros((), dtype=torch.float64), torch.zeros_like(model.logits)
        values = torch.zeros_like(model.values)
        for cut in cuts:
            part = _on(loss, batch, model, cut)
            total += part.total
            grad[_positions(batch, cut)] += part.logits_grad
            values[_positions(batch, cut)] += part.values_grad
        _equal(total, whole.total, "value")
        _equal(grad, whole.logits_grad, "gradient")
        _equal(values, whole.values_grad, "gradient of the values")


# -- calling a loss --------------------------------------------------------------------------------


def _logprobs(batch: BatchedDataDict, logits: Tensor) -> Tensor:
    """[N] logprob of each token; 0 at the first of each sequence."""
    chosen = torch.log_softmax(logits, -1).gather(-1, batch["input_ids"][:, None]).squeeze(-1)
    return chosen.masked_fill(batch.position_ids == 0, 0.0)


def _outputs(needs: Iterable[str], batch: BatchedDataDict, logits: Tensor, values: Tensor) -> ModelOutputs:
    outputs = ModelOutputs()
    wanted = set(needs)
    log_p = torch.log_softmax(logits, -1)
    if "logprobs" in wanted:
        outputs.logprobs = _logprobs(batch, logits)
    if "entropy" in wanted:
        outputs.entropy = -(log_p.exp() * log_p).sum(-1).masked_fill(batch.position_ids == 0, 0.0)
    if "logits" in wanted:
        outputs.logits = logits
    if "top_logprobs" in wanted:
        ids = batch["top_ids"].flatten(1)
        found = log_p.gather(-1, ids).masked_fill((batch.position_ids == 0)[:, None], 0.0)
        outputs.top_logprobs = found.view(batch["top_ids"].shape)
    if "values" in wanted:
        outputs.values = values
    return outputs


def _call(loss: Any, batch: BatchedDataDict, logits: Tensor, values: Tensor) -> LossSums:
    sums: LossSums = loss(_outputs(loss.needs, batch, logits, values), batch)
    return sums


def _answer(loss: Any, batch: BatchedDataDict, model: _Model) -> _Answer:
    logits, values = model.leaves()
    sums = _call(loss, batch, logits, values)
    if sums.total.requires_grad:
        torch.autograd.backward(sums.total)
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (logits, values)]
    return _Answer(sums.total.detach().to(torch.float64), grads[0], grads[1], sums)


def _on(loss: Any, batch: BatchedDataDict, model: _Model, indices: Sequence[int]) -> _Answer:
    """The answer for some sequences alone."""
    return _answer(loss, batch.select(list(indices)), model.select(_positions(batch, indices)))


def _positions(batch: BatchedDataDict, indices: Sequence[int]) -> Tensor:
    """Where the tokens of these sequences stand in the batch, in the order of `select`."""
    marked = BatchedDataDict(batch.lengths, {"at": torch.arange(batch.num_tokens)})
    found: Tensor = marked.select(list(indices))["at"]
    return found


def _flat(units: Iterable[Sequence[int]]) -> list[int]:
    return [i for unit in units for i in unit]


class _Watched(BatchedDataDict):
    """A batch that remembers which fields were read."""

    def __init__(self, batch: BatchedDataDict) -> None:
        super().__init__(batch.lengths, batch.tokens, batch.sequences)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """The field, remembered."""
        self.read.add(name)
        return super().__getitem__(name)


def _reads(loss: Any, batch: BatchedDataDict, model: _Model) -> frozenset[str]:
    watched = _Watched(batch)
    _answer(loss, watched, model)
    return frozenset(watched.read)


def _logprob_gradient(loss: Any, batch: BatchedDataDict, model: _Model) -> Tensor:
    """[N] gradient by the logprobs themselves, the other outputs held."""
    outputs = _outputs(loss.needs, batch, model.logits, model.values)
    assert outputs.logprobs is not None
    outputs.logprobs = outputs.logprobs.detach().clone().requires_grad_()
    sums: LossSums = loss(outputs, batch)
    (grad,) = torch.autograd.grad(sums.total, outputs.logprobs, materialize_grads=True)
    return grad


# -- changed batches -------------------------------------------------------------------------------


def _poisoned(batch: BatchedDataDict, poison: float) -> BatchedDataDict:
    """The batch with `poison` in every masked position of its float fields."""
    changed = batch.select(range(len(batch)))
    for name, value in batch.tokens.items():
        if value.is_floating_point() and value.ndim == 1:
            changed.set_tokens(name, value.masked_fill(~batch["loss_mask"], poison))
    return changed


def _padded(batch: BatchedDataDict, model: _Model) -> tuple[BatchedDataDict, _Model, Tensor]:
    """Every sequence lengthened to one width by untrained tokens; and where the old tokens are now."""
    width = batch.max_length + 2
    keep = torch.cat([torch.arange(int(n)) + i * width for i, n in enumerate(batch.lengths)])

    def spread(value: Tensor) -> Tensor:
        wide = torch.ones(len(batch) * width, *value.shape[1:]).to(value.dtype)
        wide[keep] = value
        return wide

    tokens = {name: spread(value) for name, value in batch.tokens.items()}
    trained = torch.zeros(len(batch) * width, dtype=torch.bool)
    trained[keep] = batch["loss_mask"]
    tokens["loss_mask"] = trained
    wide = BatchedDataDict([width] * len(batch), tokens, batch.sequences)
    return wide, _Model(spread(model.logits), spread(model.values)), keep


# -- comparing -------------------------------------------------------------------------------------


def _equal(found: Tensor, expected: Tensor, what: str) -> None:
    scale = max(float(expected.abs().max()) if expected.numel() else 0.0, 1e-12)
    finite = bool(torch.isfinite(found).all())
    worst = float((found - expected).abs().max()) if expected.numel() else 0.0
    assert finite and worst <= max(TOLERANCE * scale, 1e-12), (
        f"{what} differs by {worst:.3g} (largest {scale:.3g})" if finite else f"{what} is not finite"
    )


def _check_metrics(metrics: Mapping[str, Metric], *, empty: bool = False) -> None:
    for name, metric in metrics.items():
        assert isinstance(metric, Metric), f"metric `{name}` is a {type(metric).__name__}, not a Metric"
        for part, value in (("total", metric.total), ("count", metric.count)):
            number = torch.as_tensor(value)
            assert number.numel() == 1, f"`{part}` of metric `{name}` has shape {list(number.shape)}, not []"
            neutral = empty and metric.reduction in ("min", "max")  # inf and -inf are their neutral elements
            assert not torch.isnan(number).any(), f"metric `{name}` is nan"
            assert neutral or metric.reduction in ("min", "max") or torch.isfinite(number).all(), (
                f"metric `{name}` is not finite"
            )
            assert not number.requires_grad, f"metric `{name}` still has a gradient: detach it"


def _reduced(parts: Sequence[Mapping[str, Metric]]) -> dict[str, float]:
    reduced = {}
    for name in dict.fromkeys(key for part in parts for key in part):
        found = [part[name] for part in parts if name in part]
        totals = [float(metric.total) for metric in found]
        match found[0].reduction:
            case "min":
                reduced[name] = min(totals)
            case "max":
                reduced[name] = max(totals)
            case "sum":
                reduced[name] = sum(totals)
            case _:
                count = sum(float(metric.count) for metric in found)
                reduced[name] = sum(totals) / count if count else 0.0
    return reduced
