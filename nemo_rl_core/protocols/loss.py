"""Contract of a loss: per-token tensors in, *sums* out; the core divides.

Legend: B sequences, N tokens of one micro-batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from attrs import define, field, frozen

from nemo_rl_core.errors import ShapeMismatch

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["Denominator", "Loss", "LossSums", "Metric", "ModelOutputs", "VocabularyLoss", "per_token"]

Denominator = Literal["tokens", "sequences", "groups"] | float
"""Divisor of a loss sum, counted over the whole global batch: trained tokens (`loss_mask` is True),
sequences with at least one trained token, groups with at least one such sequence, or a constant."""


@define
class ModelOutputs:
    """Outputs of the policy's forward pass for one micro-batch."""

    logprobs: Tensor | None = None
    """[N] float32 log p(token | its prefix) at the sampling temperature; 0 at each first token."""
    entropy: Tensor | None = None
    """[N] float32 entropy in nats of the distribution that predicts the token, if the loss needs it."""
    logits: Tensor | None = None
    """[N, V] logits that predict each token, if the loss needs them (they cost memory)."""
    top_logprobs: Tensor | None = None
    """[N, ...] float32 log p of the tokens `batch["top_ids"]` [N, ...] at each position, with gradient; 0 at each
    first token. Computed in chunks; a loss over a few likely tokens needs this instead of `logits`."""
    over_vocabulary: Tensor | None = None
    """[N, F] float32 result of `VocabularyLoss.over_vocabulary` for each trained token, with gradient; 0 at the
    others."""
    values: Tensor | None = None
    """[N] float32 output of the model's scalar head after each token: a critic's value of the state, a reward
    model's score of the sequence so far."""


@frozen
class Metric:
    """A quantity that reduces correctly over micro-batches, ranks and packing.

    Args:
        total: Sum of the quantity over this micro-batch (or the extremum for "min" and "max").
        count: Number of items that `total` sums; "sum", "min" and "max" ignore it.
        reduction: "mean" divides the sum of totals by the sum of counts.
    """

    total: Tensor | float
    count: Tensor | float = 1.0
    reduction: Literal["mean", "sum", "min", "max"] = "mean"


@define
class LossSums:
    """Sums that a loss returns for one micro-batch."""

    total: Tensor
    """[] sum of the loss over the micro-batch, with gradient and not divided by anything."""
    metrics: Mapping[str, Metric] = field(factory=dict)


@runtime_checkable
class Loss(Protocol):
    """A training objective. A component of group `nemo_rl.losses`.

    A loss sums per-token (or per-sequence) terms of one micro-batch over `batch["loss_mask"]` and
    declares the divisor of the sum in `denominator`. The core counts the divisor over the whole
    global batch before the first micro-batch and divides, so gradient accumulation, data parallelism
    and packing cannot change the step.

    Attributes:
        denominator: See `Denominator`.
        needs: Fields of `ModelOutputs` that the loss reads ("logprobs", "entropy", "logits", "top_logprobs",
            "over_vocabulary", "values").

    Optional attributes:

    - `unit = "group"`: the loss compares the sequences of a group (equal `group_ids`), as losses of preference pairs
      do. Micro-batches and ranks then never split a group. The default is "sequence".
    - `corrects_importance = True`: the loss corrects the importance of rollouts that other weights sampled.
      Policy-gradient algorithms require it if `rollouts.staleness` is above 0.
    - `conformance`: facts for the loss's kit, such as `{"differentiable": False}` if the gradient is deliberately not
      that of the value.

    A loss that compares whole distributions needs "over_vocabulary" and is a `VocabularyLoss`.
    """

    denominator: Denominator
    needs: frozenset[str]

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """Sum the loss over one micro-batch.

        Args:
            outputs: The forward pass, per token of `batch`.
            batch: The micro-batch; `loss_mask` [N] bool selects the trained tokens. Masked positions may hold
                anything, in fields other than `outputs` even inf and nan.

        Returns:
            The sum, and metrics as sums; zero (with zero gradient) if no token is selected.
        """
        ...


@runtime_checkable
class VocabularyLoss(Loss, Protocol):
    """A loss that compares whole distributions. It needs a backend with the capability "over_vocabulary".

    Attributes:
        vocabulary_fields: Per-token fields of the batch that are passed to `over_vocabulary`.
    """

    vocabulary_fields: Sequence[str]

    def over_vocabulary(self, logprobs: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Compute F numbers for each token from its whole distribution, differentiable by torch.

        Called with one chunk of tokens after another, in the forward and again in the backward pass, so that no [N, V]
        matrix is held.

        Args:
            logprobs: [C, V] float32 logprobs at a chunk of trained tokens.
            fields: The `vocabulary_fields` at the same tokens, [C, ...].

        Returns:
            [C, F] numbers, which the loss finds in `ModelOutputs.over_vocabulary`.
        """
        ...


def per_token(values: Tensor | None, batch: BatchedDataDict, name: str) -> Tensor:
    """Check that `values` are [N], as `loss_mask` is, and return them.

    Args:
        values: [N] values of the tokens, such as `outputs.logprobs`.
        batch: The micro-batch.
        name: Name of the values in the error.

    Raises:
        ShapeMismatch: The values have another shape, or are None.
    """
    mask = batch["loss_mask"]
    if values is None or values.shape != mask.shape:
        shape = None if values is None else list(values.shape)
        raise ShapeMismatch(
            f"{name} has shape {shape}, loss_mask {list(mask.shape)}; both must be [N], one entry for each token of "
            "the micro-batch."
        )
    return values
