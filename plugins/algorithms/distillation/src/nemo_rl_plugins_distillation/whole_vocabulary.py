"""The same divergences over the whole vocabulary: exact, one chunk of tokens at a time.

The teachers' hidden states and output layers come to the student's workers in place of their distributions, [N, E] for
each token and [V, E] once. Both distributions of a chunk are made there, compared and forgotten.

Legend: N tokens of a micro-batch, M of them trained, C tokens of a chunk, T teachers, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from nemo_rl_core.errors import ConfigError, ShapeMismatch
from nemo_rl_core.protocols.loss import Denominator, LossSums, Metric
from nemo_rl_plugins_distillation.base import TeacherLoss, nll_sum
from nemo_rl_plugins_distillation.conformance import add_hidden_teachers
from nemo_rl_plugins_distillation.support import on_support

if TYPE_CHECKING:
    from nemo_rl_core.protocols.loss import ModelOutputs
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_core.records.shared_value import SharedValue

__all__ = ["SHARES", "WholeVocabulary", "hidden_field"]

SHARES = "teacher_shares"
"""[N, T] weight of each teacher at each token; those with 0 are not computed."""


def hidden_field(index: int) -> str:
    """Name of the field with a teacher's hidden states, [N, E]."""
    return f"teacher_hidden_{index}"


class WholeVocabulary:
    """A divergence of this package over all tokens of the vocabulary.

    It reads `teacher_shares` [N, T] and, of each teacher, `teacher_hidden_<i>` [N, E]. Where a vocabulary is padded,
    the tokens that both models have are compared, both renormalised within them; the option `tail` has no meaning.

    Args:
        loss: One of the losses against a teacher's likeliest tokens.
        layers: Output layers of the teachers (`OutputLayer`), held by the student's workers; may be filled later.

    Raises:
        ConfigError: The loss is of another kind.
    """

    denominator: Denominator = "tokens"
    required_fields: frozenset[str] = frozenset({"teacher_hidden"})
    conformance: ClassVar[Mapping[str, Any]] = {"add_fields": add_hidden_teachers}

    def __init__(self, loss: Any, layers: Sequence[SharedValue] = ()) -> None:
        if not isinstance(loss, TeacherLoss):
            raise ConfigError(
                f"top_k is null, which compares whole vocabularies, but the loss {type(loss).__name__} is not one of "
                "forward_kl, reverse_kl, mixed_kl and jensen_shannon. Choose one of these, or set top_k to a number."
            )
        self.loss = loss
        self.layers = list(layers)
        self.needs = frozenset({"over_vocabulary", *({"logprobs"} if loss.config.nll_weight else ())})

    @property
    def vocabulary_fields(self) -> tuple[str, ...]:
        """What `over_vocabulary` reads of the batch."""
        return (SHARES, *(hidden_field(i) for i in range(len(self.layers))))

    def over_vocabulary(self, logprobs: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """[C, V] logprobs of the student to the [C, T] divergences from the teachers, 0 for those without weight."""
        columns = []
        for i, layer in enumerate(self.layers):
            asked = fields[SHARES][:, i] > 0
            teacher = layer.on(logprobs.device).logprobs(fields[hidden_field(i)][asked]).to(logprobs.dtype)
            width = min(teacher.shape[1], logprobs.shape[1])
            student = logprobs[asked][:, None, :width]
            temperature = self.loss.config.temperature
            pair = on_support(student, teacher[:, None, :width], tail="renormalize", temperature=temperature)
            each = self.loss.divergence(pair, None)[:, 0]
            columns.append(logprobs.new_zeros(len(logprobs)).masked_scatter(asked, each))
        return torch.stack(columns, 1)

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """Sum over the trained tokens of one micro-batch.

        Raises:
            ShapeMismatch: The divergences are not those of the teachers of the batch.
        """
        mask, shares = batch["loss_mask"], batch[SHARES]
        divergences = outputs.over_vocabulary
        if divergences is None or divergences.shape != shares.shape:
            shape = None if divergences is None else list(divergences.shape)
            raise ShapeMismatch(f"outputs.over_vocabulary has shape {shape}, {SHARES} {list(shares.shape)}.")
        divergence = (divergences[mask] * shares[mask].to(divergences.dtype)).sum()
        config, count = self.loss.config, mask.sum()
        total = divergence * config.temperature**2
        metrics = {"divergence": Metric(divergence.detach(), count)}
        if config.nll_weight:
            nll = nll_sum(outputs.logprobs, batch)
            total = total + config.nll_weight * nll
            metrics["nll"] = Metric(nll.detach(), count)
        return LossSums(total, metrics)
