"""Division of a loss by the count over the whole global batch, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from attrs import frozen

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.loss import LossSums, Metric
from nemo_rl_core.registry import PluginCall

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_rl_core.protocols.loss import Loss, ModelOutputs, VocabularyLoss
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["GlobalCounts", "NormalizedLoss", "count_trained"]


@frozen(kw_only=True)
class GlobalCounts:
    """Counts of trained items in one optimizer step, over all micro-batches and ranks."""

    tokens: int
    sequences: int
    groups: int


def count_trained(batch: BatchedDataDict) -> GlobalCounts:
    """Count the trained tokens, the sequences and the groups that have one.

    A batch without `group_ids` counts each sequence as its own group.
    """
    mask = batch["loss_mask"]
    trained = batch.sum_per_sequence(mask.to(torch.int64)) > 0
    sequences = int(trained.sum())
    groups = sequences
    if "group_ids" in batch:
        groups = int(torch.unique(batch["group_ids"][trained]).numel())
    return GlobalCounts(tokens=int(mask.sum()), sequences=sequences, groups=groups)


class NormalizedLoss:
    """A loss whose sums are divided by the global count that it declared.

    Backends get this and call `.total.backward()` on what it returns; they never divide.
    """

    def __init__(self, loss: Loss, counts: GlobalCounts) -> None:
        self.loss = loss
        self.needs: frozenset[str] = frozenset(loss.needs)
        self.divisor: float = _divisor(loss, counts)
        if "over_vocabulary" in self.needs:
            self.vocabulary_fields: tuple[str, ...] = tuple(cast("VocabularyLoss", loss).vocabulary_fields)

    def over_vocabulary(self, logprobs: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Return the [C, F] numbers that the loss makes of `logprobs` [C, V], see `VocabularyLoss`."""
        with PluginCall("losses", self.loss, "over_vocabulary"):
            return cast("VocabularyLoss", self.loss).over_vocabulary(logprobs, fields)

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """The divided loss of one micro-batch, and its metrics with `loss` added."""
        with PluginCall("losses", self.loss, "__call__"):
            sums = self.loss(outputs, batch)
            if not isinstance(sums, LossSums):
                raise TypeError(
                    f"it returned {type(sums).__name__}, not a LossSums. Return LossSums(total, metrics), total being "
                    "the sum over the micro-batch."
                )
        total = sums.total / self.divisor
        metrics: Mapping[str, Metric] = {
            **sums.metrics,
            "loss": Metric(total.detach(), reduction="sum"),
        }
        return LossSums(total, metrics)


def _divisor(loss: Loss, counts: GlobalCounts) -> float:
    denominator = loss.denominator
    if isinstance(denominator, (int, float)):
        return float(denominator)
    if denominator not in ("tokens", "sequences", "groups"):
        raise ConfigError(
            f"Loss {type(loss).__name__} declares denominator {denominator!r}. "
            'Allowed: "tokens", "sequences", "groups" or a number.'
        )
    # A batch with nothing to train has loss 0, not nan.
    return float(max(getattr(counts, denominator), 1))
