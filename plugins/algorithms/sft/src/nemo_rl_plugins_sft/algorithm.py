"""Supervised fine-tuning: the likelihood of what the assistant said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from nemo_rl_core.data.prompts import sft_messages
from nemo_rl_core.protocols.algorithm import AlgorithmContext, BaseAlgorithm
from nemo_rl_plugins_sft.config import SFTConfig

if TYPE_CHECKING:
    from nemo_rl_core.protocols.loss import Loss
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["SFT"]


class SFT(BaseAlgorithm):
    """Trains on conversations (`messages`) and on prompt/response rows."""

    config_class: ClassVar[type] = SFTConfig
    feed: ClassVar[Literal["rollouts", "examples"]] = "examples"

    def __init__(self, config: SFTConfig, context: AlgorithmContext) -> None:
        from nemo_rl_core.data.encoding import ConversationEncoder

        super().__init__(config, context)
        self.loss: Loss = context.resolve("losses", config.loss)
        self._encoder = ConversationEncoder(
            context.tokenizer,
            max_length=context.max_sequence_length,
            train_on=config.train_on,
            chat_template_kwargs=config.data.chat_template_kwargs,
        )

    def build_batch(self, items: Sequence[Mapping[str, Any]]) -> BatchedDataDict:
        """Tokenise rows; a row longer than the context loses its end, and `truncated` [B] says so.

        Raises:
            DataError: A row is not a conversation, has nothing of the assistant in it, or no token.
        """
        rows = enumerate(items)
        return self._encoder.batch([sft_messages(row, where=f"example {i} of the batch") for i, row in rows])

    def finish_batch(self, batch: BatchedDataDict) -> Mapping[str, float]:
        """Counts: trained tokens, mean length, and the shares of rows cut off and of rows left without a target."""
        num_rows = max(len(batch), 1)
        trained = batch.sum_per_sequence(batch["loss_mask"].long())
        return {
            "trained_tokens": float(trained.sum()),
            "mean_length": batch.num_tokens / num_rows,
            "truncated_fraction": float(batch["truncated"].sum()) / num_rows,
            "untrained_fraction": float((trained == 0).sum()) / num_rows,
        }
