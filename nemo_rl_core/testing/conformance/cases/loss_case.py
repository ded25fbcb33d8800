"""Case for the contract of a loss: a batch with a policy of free logits, calls of a loss, and comparisons.

Legend: N tokens of the batch, V vocabulary, K chosen tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from attrs import frozen
from torch import Tensor

from nemo_rl_core.protocols.loss import LossSums, Metric, ModelOutputs, VocabularyLoss
from nemo_rl_core.records.batch import BatchedDataDict

__all__ = [
    "Answer",
    "CalledLoss",
    "FreeModel",
    "answer_of",
    "answer_on",
    "call_loss",
    "check_equal",
    "check_metrics",
    "check_same_when_cut",
    "fields_read",
    "flat",
    "logprob_gradient",
    "logprobs_of",
    "make_on_policy",
    "off_policy_case",
    "padded",
    "poisoned",
    "positions_of",
    "reduced",
]

VOCABULARY = 7
TOLERANCE = 1e-9
"""Relative, of values and gradients in float64."""
_ADVANTAGES = (1.0, -1.2, -0.7, 0.9, -1.1, 1.3)


class CalledLoss(Protocol):
    """A loss as a backend calls it: the loss itself, or the one that the core normalizes."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `ModelOutputs` that the loss reads."""
        ...

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """Sum the loss over one micro-batch."""
        ...


@frozen(eq=False)
class FreeModel:
    """A stand-in for the policy: free logits and values, so that gradients are per token."""

    logits: Tensor
    """[N, V] float64."""
    values: Tensor
    """[N] float64."""

    def select(self, positions: Tensor) -> FreeModel:
        """Return the model at the tokens of `positions` [K] alone, with logits [K, V] and values [K]."""
        return FreeModel(self.logits[positions], self.values[positions])

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Return copies of the logits [N, V] and the values [N] that accumulate gradients."""
        return self.logits.detach().clone().requires_grad_(), self.values.detach().clone().requires_grad_()


@frozen(eq=False)
class Answer:
    """A loss sum and its gradient for each token."""

    total: Tensor
    """[] float64."""
    logits_grad: Tensor
    """[N, V] float64."""
    values_grad: Tensor
    """[N] float64."""
    sums: LossSums


# -- batches ---------------------------------------------------------------------------------------


def off_policy_case() -> tuple[BatchedDataDict, FreeModel, torch.Generator]:
    """Make a batch whose four policies differ by a few per cent, its model, and the generator for further fields."""
    generator = torch.Generator().manual_seed(11)
    lengths = [5, 3, 8, 4, 6, 7]
    n = sum(lengths)
    model = FreeModel(
        torch.randn(n, VOCABULARY, generator=generator, dtype=torch.float64),
        torch.randn(n, generator=generator, dtype=torch.float64),
    )
    batch = BatchedDataDict(lengths, {"input_ids": torch.randint(VOCABULARY, (n,), generator=generator)})
    starts = batch.position_ids
    mask = (starts > 0) & ((starts > 1) | (batch.sequence_index % 2 == 0))
    mask &= torch.rand(n, generator=generator) > 0.15
    batch.set_tokens("loss_mask", mask | (starts == batch.lengths[batch.sequence_index] - 1))
    current = logprobs_of(batch, model.logits)
    for name, spread in (("logprobs", 0.05), ("rollout_logprobs", 0.07), ("ref_logprobs", 0.3)):
        noise = torch.randn(n, generator=generator, dtype=torch.float64)
        batch.set_tokens(name, (current + spread * noise) * (starts > 0))
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 1.0], dtype=torch.float64)
    advantages = batch.expand_to_tokens(torch.tensor(_ADVANTAGES, dtype=torch.float64))
    batch.set_tokens("advantages", advantages * (0.5 + torch.rand(n, generator=generator, dtype=torch.float64)))
    batch.set_sequences("rewards", rewards)
    batch.set_sequences("group_ids", torch.tensor([0, 0, 1, 1, 2, 2]))
    batch.set_sequences("is_chosen", torch.tensor([True, False] * 3))
    batch.set_sequences("margins", torch.tensor([0.5, 0.5, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64))
    for name in ("values", "returns"):
        batch.set_tokens(name, model.values + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64))
    return batch, model, generator


def make_on_policy(batch: BatchedDataDict, model: FreeModel) -> None:
    """Make the four policies equal, and the advantages of each sequence one number, in place."""
    current = logprobs_of(batch, model.logits).detach()
    for name in ("logprobs", "rollout_logprobs", "ref_logprobs"):
        batch.set_tokens(name, current.clone())
    per_sequence = torch.tensor(_ADVANTAGES, dtype=torch.float64)
    batch.set_tokens("advantages", batch.expand_to_tokens(per_sequence))


# -- calling a loss --------------------------------------------------------------------------------


def logprobs_of(batch: BatchedDataDict, logits: Tensor) -> Tensor:
    """[N] logprob of each token; 0 at the first of each sequence."""
    chosen = torch.log_softmax(logits, -1).gather(-1, batch["input_ids"][:, None]).squeeze(-1)
    return chosen.masked_fill(batch.position_ids == 0, 0.0)


def _outputs_for(loss: CalledLoss, batch: BatchedDataDict, logits: Tensor, values: Tensor) -> ModelOutputs:
    """Compute the outputs that the loss needs from logits [N, V] and values [N]."""
    outputs = ModelOutputs()
    wanted = set(loss.needs)
    log_p = torch.log_softmax(logits, -1)
    if "logprobs" in wanted:
        outputs.logprobs = logprobs_of(batch, logits)
    if "entropy" in wanted:
        outputs.entropy = -(log_p.exp() * log_p).sum(-1).masked_fill(batch.position_ids == 0, 0.0)
    if "logits" in wanted:
        outputs.logits = logits
    if "top_logprobs" in wanted:
        ids = batch["top_ids"].flatten(1)
        found = log_p.gather(-1, ids).masked_fill((batch.position_ids == 0)[:, None], 0.0)
        outputs.top_logprobs = found.view(batch["top_ids"].shape)
    if "over_vocabulary" in wanted:
        at = batch["loss_mask"]
        whole = cast("VocabularyLoss", loss)
        found = whole.over_vocabulary(log_p[at], {name: batch[name][at] for name in whole.vocabulary_fields})
        outputs.over_vocabulary = found.new_zeros(batch.num_tokens, *found.shape[1:]).masked_scatter(
            at.view(-1, *(1,) * (found.ndim - 1)), found
        )
    if "values" in wanted:
        outputs.values = values
    return outputs


def call_loss(loss: CalledLoss, batch: BatchedDataDict, logits: Tensor, values: Tensor) -> LossSums:
    """Call the loss on outputs computed from logits [N, V] and values [N]."""
    return loss(_outputs_for(loss, batch, logits, values), batch)


def answer_of(loss: CalledLoss, batch: BatchedDataDict, model: FreeModel) -> Answer:
    """Return the loss sum of a batch and its gradients."""
    logits, values = model.leaves()
    sums = call_loss(loss, batch, logits, values)
    if sums.total.requires_grad:
        torch.autograd.backward(sums.total)
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (logits, values)]
    return Answer(sums.total.detach().to(torch.float64), grads[0], grads[1], sums)


def answer_on(loss: CalledLoss, batch: BatchedDataDict, model: FreeModel, indices: Sequence[int]) -> Answer:
    """Return the loss sum of some sequences alone and its gradients."""
    return answer_of(loss, batch.select(list(indices)), model.select(positions_of(batch, indices)))


def positions_of(batch: BatchedDataDict, indices: Sequence[int]) -> Tensor:
    """[K] int64 positions of these sequences' tokens in the batch, in the order of `select`."""
    marked = BatchedDataDict(batch.lengths, {"at": torch.arange(batch.num_tokens)})
    found: Tensor = marked.select(list(indices))["at"]
    return found


def flat(units: Iterable[Sequence[int]]) -> list[int]:
    """Return the sequences of several units in one list."""
    return [i for unit in units for i in unit]


class _Watched(BatchedDataDict):
    """A batch that records which fields were read."""

    def __init__(self, batch: BatchedDataDict) -> None:
        super().__init__(batch.lengths, batch.tokens, batch.sequences)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """Return the field and record that it was read."""
        self.read.add(name)
        return super().__getitem__(name)


def fields_read(loss: CalledLoss, batch: BatchedDataDict, model: FreeModel) -> frozenset[str]:
    """Return the names of the batch fields that the loss reads."""
    watched = _Watched(batch)
    answer_of(loss, watched, model)
    return frozenset(watched.read)


def logprob_gradient(loss: CalledLoss, batch: BatchedDataDict, model: FreeModel) -> Tensor:
    """[N] gradient with respect to the logprobs, while the other outputs are held fixed."""
    outputs = _outputs_for(loss, batch, model.logits, model.values)
    assert outputs.logprobs is not None
    outputs.logprobs = outputs.logprobs.detach().clone().requires_grad_()
    sums = loss(outputs, batch)
    (grad,) = torch.autograd.grad(sums.total, outputs.logprobs, materialize_grads=True)
    return grad


# -- changed batches -------------------------------------------------------------------------------


def poisoned(batch: BatchedDataDict, poison: float) -> BatchedDataDict:
    """Copy the batch with `poison` at every masked position of its float fields."""
    changed = batch.select(range(len(batch)))
    for name, value in batch.tokens.items():
        if value.is_floating_point():
            outside = (~batch["loss_mask"]).view(-1, *(1,) * (value.ndim - 1))
            changed.set_tokens(name, value.masked_fill(outside, poison))
    return changed


def padded(batch: BatchedDataDict, model: FreeModel) -> tuple[BatchedDataDict, FreeModel, Tensor]:
    """Pad every sequence to one width with untrained tokens; also return where the old tokens are now, [N] int64."""
    width = batch.max_length + 2
    keep = torch.cat([torch.arange(int(n)) + i * width for i, n in enumerate(batch.lengths)])

    def spread(value: Tensor) -> Tensor:
        """Move `value` [N, ...] of the old tokens to their new places; the padding gets 1."""
        wide = torch.ones(len(batch) * width, *value.shape[1:]).to(value.dtype)
        wide[keep] = value
        return wide

    tokens = {name: spread(value) for name, value in batch.tokens.items()}
    trained = torch.zeros(len(batch) * width, dtype=torch.bool)
    trained[keep] = batch["loss_mask"]
    tokens["loss_mask"] = trained
    wide = BatchedDataDict([width] * len(batch), tokens, batch.sequences)
    return wide, FreeModel(spread(model.logits), spread(model.values)), keep


# -- comparing -------------------------------------------------------------------------------------


def check_same_when_cut(
    loss: CalledLoss, batch: BatchedDataDict, model: FreeModel, cuts: Sequence[Sequence[int]]
) -> None:
    """Fail unless the sums and gradients of the parts add up to those of the whole batch."""
    whole = answer_of(loss, batch, model)
    total, grad = torch.zeros((), dtype=torch.float64), torch.zeros_like(model.logits)
    values = torch.zeros_like(model.values)
    for cut in cuts:
        part = answer_on(loss, batch, model, cut)
        total += part.total
        grad[positions_of(batch, cut)] += part.logits_grad
        values[positions_of(batch, cut)] += part.values_grad
    check_equal(total, whole.total, "value")
    check_equal(grad, whole.logits_grad, "gradient")
    check_equal(values, whole.values_grad, "gradient of the values")


def check_equal(found: Tensor, expected: Tensor, what: str) -> None:
    """Fail if two tensors of one shape [...] differ by more than rounding; the message has the largest difference."""
    scale = max(float(expected.abs().max()) if expected.numel() else 0.0, 1e-12)
    finite = bool(torch.isfinite(found).all())
    worst = float((found - expected).abs().max()) if expected.numel() else 0.0
    assert finite and worst <= max(TOLERANCE * scale, 1e-12), (
        f"{what} differs by {worst:.3g} (largest {scale:.3g})" if finite else f"{what} is not finite"
    )


def check_metrics(metrics: Mapping[str, Metric], *, empty: bool = False) -> None:
    """Fail unless each metric is a finite scalar without gradient; `empty` means that no token was trained."""
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


def reduced(parts: Sequence[Mapping[str, Metric]]) -> dict[str, float]:
    """Reduce each metric over all parts, as the core does."""
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
