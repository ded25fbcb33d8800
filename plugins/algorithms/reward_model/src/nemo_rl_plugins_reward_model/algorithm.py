"""Training of a reward model: pairs of answers, a score for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from nemo_rl_core.data.preferences import preference_pair
from nemo_rl_core.errors import DataError
from nemo_rl_core.protocols.algorithm import AlgorithmContext, BaseAlgorithm
from nemo_rl_plugins_reward_model.config import RewardModelConfig

if TYPE_CHECKING:
    from nemo_rl_core.protocols.loss import Loss
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["RewardModel"]


class RewardModel(BaseAlgorithm):
    """Trains a scalar head, and the model under it, to score the better answer of a pair higher."""

    config_class: ClassVar[type] = RewardModelConfig
    feed: ClassVar[Literal["rollouts", "examples"]] = "examples"
    example: ClassVar[Mapping[str, Any]] = {
        "rows": [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "no"} for a in range(5) for b in range(5)],
        "target": None,
    }
    """For its kit: pairs that a tiny model learns to tell apart."""

    def __init__(self, config: RewardModelConfig, context: AlgorithmContext) -> None:
        from nemo_rl_core.data.encoding import ConversationEncoder

        super().__init__(config, context)
        self.loss: Loss = context.resolve("losses", config.loss)
        self._encoder = ConversationEncoder(
            context.tokenizer,
            max_length=context.max_sequence_length,
            train_on="all",
            chat_template_kwargs=config.data.chat_template_kwargs,
        )

    def build_batch(self, items: Sequence[Mapping[str, Any]]) -> BatchedDataDict:
        """Two sequences for each pair; `loss_mask` selects the token that carries the score, the last of each.

        Raises:
            DataError: A row is no preference (see `nemo_rl_core.data.preferences`), has no token, or no margin although
                the loss reads it.
        """
        import torch

        from nemo_rl_core.data.preference_batch import preference_batch

        pairs = [preference_pair(row, where=f"example {i} of the batch") for i, row in enumerate(items)]
        bare = [i for i, pair in enumerate(pairs) if pair.margin is None]
        if bare and getattr(self.loss, "reads_margins", False):
            raise DataError(
                f"Example {bare[0]} of the batch does not say how much better its chosen answer is. The loss reads it:"
                " give the column `margin` (or scores or ranks), or set loss.options.margin_weight to 0."
            )
        batch = preference_batch(pairs, self._encoder)
        last = torch.zeros(batch.num_tokens, dtype=torch.bool)
        last[batch.offsets[1:] - 1] = True
        batch.set_tokens("loss_mask", batch["loss_mask"] & last)
        return batch

    def finish_batch(self, batch: BatchedDataDict) -> Mapping[str, float]:
        """Mean length, and the shares of sequences cut off and of sequences left untrained (ties)."""
        num_sequences = max(len(batch), 1)
        trained = batch.sum_per_sequence(batch["loss_mask"].long())
        return {
            "mean_length": batch.num_tokens / num_sequences,
            "truncated_fraction": float(batch["truncated"].sum()) / num_sequences,
            "untrained_fraction": float((trained == 0).sum()) / num_sequences,
        }
