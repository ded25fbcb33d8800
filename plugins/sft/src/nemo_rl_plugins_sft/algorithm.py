"""Supervised fine-tuning: the likelihood of what the assistant said."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from nemo_rl_core._errors import DataError
from nemo_rl_core.protocols.algorithm import AlgorithmContext, BaseAlgorithm
from nemo_rl_plugins_sft.config import SFTConfig
from nemo_rl_plugins_sft.conversation import ConversationSplitter
from nemo_rl_plugins_sft.tokenization import TokenizedText, tokenize_pieces

if TYPE_CHECKING:
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
        self._cache: dict[str, TokenizedText] = {}
        self._num_cached_tokens = 0

    def build_batch(self, items: Sequence[Mapping[str, Any]]) -> BatchedDataDict:
        """Tokenise rows; a row longer than the context loses its end, and `truncated` [B] says so.

        Raises:
            DataError: A row is not a conversation, has nothing of the assistant in it, or no token.
        """
        import torch

        from nemo_rl_core.data.batch import BatchedDataDict

        texts = self._tokenized(items)
        limit = self.context.max_sequence_length
        masks = [text.trained[:limit] for text in texts]
        for mask in masks:
            mask[0] = False  # nothing predicts the first token
        return BatchedDataDict(
            [len(mask) for mask in masks],
            {
                "input_ids": torch.tensor([i for text in texts for i in text.token_ids[:limit]], dtype=torch.int64),
                "loss_mask": torch.tensor([trained for mask in masks for trained in mask], dtype=torch.bool),
            },
            {"truncated": torch.tensor([len(text.token_ids) > limit for text in texts], dtype=torch.bool)},
        )

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

    def _tokenized(self, items: Sequence[Mapping[str, Any]]) -> list[TokenizedText]:
        from nemo_rl_core.data.prompts import sft_messages

        conversations = [sft_messages(row, where=f"example {number} of the batch") for number, row in enumerate(items)]
        keys = [json.dumps(messages, default=repr) for messages in conversations]
        missing = {key: c for key, c in zip(keys, conversations, strict=True) if key not in self._cache}
        pieces = [self._splitter.split(messages) for messages in missing.values()]
        found = dict(zip(missing, tokenize_pieces(self.context.tokenizer, pieces), strict=True))
        for key, text in found.items():
            if not text.token_ids:
                raise DataError(f"A row has no token at all: {key[:200]}. Remove it, or give it content.")
            if self._num_cached_tokens + len(text.token_ids) <= _MAX_CACHED_TOKENS:
                self._cache[key] = text
                self._num_cached_tokens += len(text.token_ids)
        return [found[key] if key in found else self._cache[key] for key in keys]
