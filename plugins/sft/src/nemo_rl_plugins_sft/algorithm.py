"""Supervised fine-tuning: the likelihood of what the assistant said."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from nemo_rl_core._errors import DataError
from nemo_rl_core.protocols.algorithm import AlgorithmContext, BaseAlgorithm
from nemo_rl_plugins_sft.config import SFTConfig
from nemo_rl_plugins_sft.conversation import ConversationSplitter
from nemo_rl_plugins_sft.tokenization import tokenize_pieces

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_rl_core.data.batch import BatchedDataDict
    from nemo_rl_core.protocols.loss import Loss

__all__ = ["SFT"]

_MAX_CACHED_TOKENS = 4_000_000


class SFT(BaseAlgorithm):
    """Trains on conversations (`messages`) and on prompt/response rows.

    Tokenised rows are kept (up to some million tokens), so that later epochs do not tokenise again.
    """

    config_class: ClassVar[type] = SFTConfig
    feed: ClassVar[Literal["rollouts", "examples"]] = "examples"

    def __init__(self, config: SFTConfig, context: AlgorithmContext) -> None:
        super().__init__(config, context)
        self.loss: Loss = context.resolve("losses", config.loss)
        self._splitter = ConversationSplitter(
            context.tokenizer,
            train_on=config.train_on,
            chat_template_kwargs=config.data.chat_template_kwargs,
        )
        self._cache: dict[str, Tensor] = {}
        self._num_cached_tokens = 0

    def build_batch(self, items: Sequence[Mapping[str, Any]]) -> BatchedDataDict:
        """Tokenise rows; a row longer than the context loses its end, and `truncated` [B] says so.

        Raises:
            DataError: A row is not a conversation, has nothing of the assistant in it, or no token.
        """
        import torch

        from nemo_rl_core.data.batch import BatchedDataDict

        limit = self.context.max_sequence_length
        rows = self._tokenized(items)
        kept = [row[:, :limit] for row in rows]
        tokens = torch.cat(kept, dim=1) if kept else torch.zeros(2, 0, dtype=torch.int64)
        batch = BatchedDataDict(
            [row.shape[1] for row in kept],
            {"input_ids": tokens[0], "loss_mask": tokens[1].bool()},
            {"truncated": torch.tensor([row.shape[1] > limit for row in rows], dtype=torch.bool)},
        )
        batch["loss_mask"][batch.offsets[:-1]] = False  # nothing predicts a first token
        return batch

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

    def _tokenized(self, items: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """For each row [2, T] int64: token ids, and 1 where trained."""
        import torch

        from nemo_rl_core.data.prompts import sft_messages

        conversations = [sft_messages(row, where=f"example {number} of the batch") for number, row in enumerate(items)]
        keys = [json.dumps(messages, default=repr) for messages in conversations]
        missing = {key: c for key, c in zip(keys, conversations, strict=True) if key not in self._cache}
        texts = tokenize_pieces(self.context.tokenizer, [self._splitter.split(c) for c in missing.values()])
        found: dict[str, Tensor] = {}
        for key, text in zip(missing, texts, strict=True):
            if not text.token_ids:
                raise DataError(f"A row has no token at all: {key[:200]}. Remove it, or give it content.")
            found[key] = torch.tensor([text.token_ids, text.trained], dtype=torch.int64)
            if self._num_cached_tokens + len(text.token_ids) <= _MAX_CACHED_TOKENS:
                self._cache[key] = found[key]
                self._num_cached_tokens += len(text.token_ids)
        return [found[key] if key in found else self._cache[key] for key in keys]
