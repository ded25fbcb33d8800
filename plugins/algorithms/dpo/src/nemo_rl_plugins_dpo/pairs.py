"""What losses of pairs share: logprobs of both answers, the sum over the micro-batch, the metrics.

Legend: P pairs of one micro-batch, N tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import frozen

from nemo_rl_core.protocols.loss import Denominator, LossSums, Metric, per_token

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_rl_core.protocols.loss import ModelOutputs
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["PairLoss", "Pairs", "ReferencePairLoss", "log_sigmoid", "logprob_sums"]


def log_sigmoid(values: Tensor) -> Tensor:
    """[P] to [P]: log(1 / (1 + exp(-x))), without overflow."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)


def logprob_sums(logprobs: Tensor | None, batch: BatchedDataDict, name: str) -> Tensor:
    """[N] to [B]: each sequence's logprobs summed over its trained tokens; whatever stands elsewhere is left out.

    Raises:
        ShapeMismatch: `logprobs` is not [N].
    """
    return batch.sum_per_sequence(per_token(logprobs, batch, name).masked_fill(~batch["loss_mask"], 0.0))


@frozen(eq=False)
class Pairs:
    """The pairs of a micro-batch of which both answers are trained. All [P]."""

    chosen: Tensor
    """Logprob of the chosen answer: the sum over its trained tokens, with gradient."""
    rejected: Tensor
    ref_chosen: Tensor
    """The same under the reference; 0 for losses without one."""
    ref_rejected: Tensor
    chosen_length: Tensor
    """Trained tokens of the chosen answer, >= 1, as floats."""
    rejected_length: Tensor

    @classmethod
    def read(cls, outputs: ModelOutputs, batch: BatchedDataDict, *, with_reference: bool) -> Pairs:
        """Gather them from a micro-batch.

        Args:
            outputs: `logprobs` [N].
            batch: `loss_mask` [N], `group_ids` and `is_chosen` [B], and `ref_logprobs` [N] with a reference.
            with_reference: Whether to read `ref_logprobs`.
        """
        from nemo_rl_core.data.preference_batch import pair_positions

        chosen, rejected = pair_positions(batch)
        sums = logprob_sums(outputs.logprobs, batch, "outputs.logprobs")
        ref = (
            logprob_sums(batch["ref_logprobs"], batch, "ref_logprobs") if with_reference else sums.new_zeros(len(batch))
        )
        lengths = batch.sum_per_sequence(batch["loss_mask"].to(sums.dtype))
        return cls(sums[chosen], sums[rejected], ref[chosen], ref[rejected], lengths[chosen], lengths[rejected])

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """[P] each: log(policy / reference) of the chosen and of the rejected answers."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    @property
    def mean_logprobs(self) -> tuple[Tensor, Tensor]:
        """[P] each: logprobs per token, of the chosen and of the rejected answers."""
        return self.chosen / self.chosen_length, self.rejected / self.rejected_length


class PairLoss(ABC):
    """A loss that compares the two answers of a pair; the mean over the pairs of the global batch.

    A subclass says what one pair costs and what it takes for the rewards.
    """

    config_class: ClassVar[type]
    denominator: Denominator = "groups"
    unit: ClassVar[str] = "group"
    needs: frozenset[str] = frozenset({"logprobs"})
    required_fields: frozenset[str] = frozenset()
    """Of "ref_logprobs": what the algorithm is to add to a batch."""

    def __init__(self, config: Any = None) -> None:
        self.config = self.config_class() if config is None else config

    @abstractmethod
    def terms(self, pairs: Pairs) -> Tensor:
        """[P] the loss of each pair."""

    @abstractmethod
    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """[P] each: the implicit rewards of the chosen and of the rejected answers, for the metrics."""

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """Sum over the pairs of one micro-batch.

        Args:
            outputs: `logprobs` [N].
            batch: See `Pairs.read`; masked positions may hold anything.

        Raises:
            ShapeMismatch: A field is not [N], or the sequences are not pairs.
        """
        pairs = Pairs.read(outputs, batch, with_reference="ref_logprobs" in self.required_fields)
        terms = self.terms(pairs)
        metrics = self._metrics(pairs)
        weight = getattr(self.config, "nll_weight", 0.0)
        nll = -pairs.mean_logprobs[0]
        if weight > 0:
            terms = terms + weight * nll
        metrics["nll"] = Metric(nll.detach().sum(), len(nll))
        return LossSums(terms.sum(), metrics)

    def _metrics(self, pairs: Pairs) -> dict[str, Metric]:
        count = len(pairs.chosen)
        chosen, rejected = (reward.detach() for reward in self.rewards(pairs))
        values_of = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "logps/chosen": pairs.chosen.detach(),
            "logps/rejected": pairs.rejected.detach(),
        }
        return {name: Metric(values.sum(), count) for name, values in values_of.items()}


class ReferencePairLoss(PairLoss):
    """A loss of log-ratios to a reference; the reward is beta times the log-ratio."""

    required_fields: frozenset[str] = frozenset({"ref_logprobs"})

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """[P] each: the log-ratio to the reference, times beta."""
        chosen, rejected = pairs.log_ratios
        return self.config.beta * chosen, self.config.beta * rejected

    def logits(self, pairs: Pairs) -> Tensor:
        """[P] the difference of the rewards, of which the sigmoid is the probability of the preference."""
        chosen, rejected = self.rewards(pairs)
        return chosen - rejected
