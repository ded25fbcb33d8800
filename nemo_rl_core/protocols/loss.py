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
"""What a loss sum is divided by, over the whole global batch: trained tokens (`loss_mask` is True),
sequences with at least one trained token, groups with at least one such sequence, or a constant."""


@define
class ModelOutputs:
    """What one forward pass of the policy gives to the loss for one micro-batch."""

    logprobs: Tensor | None = None
    """[N] float32 log p(token | its prefix) at the sampling temperature; 0 at each first token."""
    entropy: Tensor | None = None
    """[N] float32 entropy in nats of the distribution that predicts the token, if asked for."""
    logits: Tensor | None = None
    """[N, V] logits that predict each token, only if the loss asks for them (costs memory)."""
    top_logprobs: Tensor | None = None
    """[N, ...] float32 log p of the tokens `batch["top_ids"]` [N, ...] in place of each token, with gradient; 0 at each
    first token. Made in chunks: what a loss over a few likely tokens asks for in place of `logits`."""
    over_vocabulary: Tensor | None = None
    """[N, F] float32 what the loss's own function of whole distributions gave for each trained token, with gradient; 0
    at the others. See `Loss`."""
    values: Tensor | None = None
    """[N] float32 output of the model's scalar head at each token, which has read the token: a critic's value of
    the state after it, a reward model's score of the sequence so far."""


@frozen
class Metric:
    """A quantity that reduces correctly over micro-batches, ranks and packing.

    Args:
        total: Sum of the quantity over this micro-batch (or the extremum for "min" and "max").
        count: How many items `total` sums; ignored by "sum", "min" and "max".
        reduction: "mean" is sum of totals over sum of counts.
    """

    total: Tensor | float
    count: Tensor | float = 1.0
    reduction: Literal["mean", "sum", "min", "max"] = "mean"


@define
class LossSums:
    """What a loss returns for one micro-batch."""

    total: Tensor
    """[] the loss summed over the micro-batch, with gradient; not divided by anything."""
    metrics: Mapping[str, Metric] = field(factory=dict)


@runtime_checkable
class Loss(Protocol):
    """A training objective.

    A loss sums per-token (or per-sequence) terms of one micro-batch over `batch["loss_mask"]` and
    declares in `denominator` what the sum is to be divided by. The core counts that over the whole
    global batch before the first micro-batch and divides, so gradient accumulation, data parallelism
    and packing cannot change the step that is taken.

    Attributes:
        denominator: See `Denominator`.
        needs: Fields of `ModelOutputs` that the loss reads ("logprobs", "entropy", "logits", "top_logprobs",
            "over_vocabulary", "values").

    A loss may have the attribute `unit`: "sequence" (as without it), or "group" if it compares the sequences
    of a group (equal `group_ids`), as losses of preference pairs do. A group is then never cut apart by
    micro-batches or ranks. One that corrects the importance of rollouts which other weights sampled says so by
    `corrects_importance = True`; policy-gradient algorithms ask for it when `rollouts.staleness` is above 0.
    One that compares whole distributions needs "over_vocabulary" and is a `VocabularyLoss`.
    It may have `conformance`, what its kit should know,
    such as `{"differentiable": False}` where the gradient is on purpose not that of the value.
    """

    denominator: Denominator
    needs: frozenset[str]

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """Sum the loss over one micro-batch.

        Args:
            outputs: The forward pass, per token of `batch`.
            batch: The micro-batch; `loss_mask` [N] bool selects what is trained. Anything may stand in
                masked positions, also inf and nan in fields other than `outputs`.

        Returns:
            The sum, and metrics as sums; zero (with zero gradient) when nothing is selected.
        """
        ...


@runtime_checkable
class VocabularyLoss(Loss, Protocol):
    """A loss that compares whole distributions, which the backends with the capability "over_vocabulary" serve.

    Attributes:
        vocabulary_fields: Per-token fields of the batch that `over_vocabulary` gets.
    """

    vocabulary_fields: Sequence[str]

    def over_vocabulary(self, logprobs: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """What the loss wants to know of each token, [C, F], differentiable by torch.

        Called with one chunk of tokens after another, in the forward and again in the backward pass, so that no [N, V]
        matrix is held.

        Args:
            logprobs: [C, V] float32 of a chunk of trained tokens.
            fields: The `vocabulary_fields` at the same tokens, [C, ...].
        """
        ...


def per_token(values: Tensor | None, batch: BatchedDataDict, name: str) -> Tensor:
    """`values`, which a loss reads beside `loss_mask`, once they are seen to be [N].

    Args:
        values: Of each token, such as `outputs.logprobs`.
        batch: The micro-batch.
        name: What `values` are called in the error.

    Raises:
        ShapeMismatch: They are of another shape, or there are none.
    """
    mask = batch["loss_mask"]
    if values is None or values.shape != mask.shape:
        found = None if values is None else list(values.shape)
        raise ShapeMismatch(
            f"{name} has shape {found}, loss_mask {list(mask.shape)}; both must be [N], one entry for each token of "
            "the micro-batch."
        )
    return values
