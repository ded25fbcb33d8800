"""Encoding of conversations as token ids with a loss mask; each text is tokenised once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_rl_core.data.conversation import ConversationSplitter, TrainOn
from nemo_rl_core.data.tokenization import tokenize_pieces
from nemo_rl_core.errors import DataError
from nemo_rl_core.models.tokenizer import Tokenizer
from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["ConversationEncoder"]

_MAX_CACHED_TOKENS = 4_000_000


class ConversationEncoder:
    """Tokenises conversations and marks what is trained on.

    Tokenised rows are kept (up to some million tokens), so that later epochs do not tokenise again.

    Args:
        tokenizer: Its `chat_template` decides; see `ConversationSplitter`.
        max_length: Tokens of the longest sequence; a longer one loses its end.
        train_on: "assistant", "last_assistant" or "all".
        chat_template_kwargs: Passed to the template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        train_on: TrainOn = "assistant",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._splitter = ConversationSplitter(tokenizer, train_on=train_on, chat_template_kwargs=chat_template_kwargs)
        self._cache: dict[str, Tensor] = {}
        self._num_cached_tokens = 0

    def batch(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> BatchedDataDict:
        """One sequence for each conversation, in their order.

        Returns:
            `input_ids` [N], `loss_mask` [N] (never at a first token), and `truncated` [B] bool.

        Raises:
            DataError: The template refuses a conversation, or one has no token at all.
        """
        rows = self._encode(conversations)
        kept = [row[:, : self._max_length] for row in rows]
        tokens = torch.cat(kept, dim=1) if kept else torch.zeros(2, 0, dtype=torch.int64)
        batch = BatchedDataDict(
            [row.shape[1] for row in kept],
            {"input_ids": tokens[0], "loss_mask": tokens[1].bool()},
            {"truncated": torch.tensor([row.shape[1] > self._max_length for row in rows], dtype=torch.bool)},
        )
        batch["loss_mask"][batch.offsets[:-1]] = False  # nothing predicts a first token
        return batch

    def _encode(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[Tensor]:
        """For each conversation [2, T] int64: token ids, and 1 where trained."""
        keys = [json.dumps(messages, default=repr) for messages in conversations]
        missing = {key: c for key, c in zip(keys, conversations, strict=True) if key not in self._cache}
        texts = tokenize_pieces(self._tokenizer, [self._splitter.split(c) for c in missing.values()])
        encoded: dict[str, Tensor] = {}
        for key, text in zip(missing, texts, strict=True):
            if not text.token_ids:
                raise DataError(f"A row has no token at all: {key[:200]}. Remove it, or give it content.")
            encoded[key] = torch.tensor([text.token_ids, text.trained], dtype=torch.int64)
            if self._num_cached_tokens + len(text.token_ids) <= _MAX_CACHED_TOKENS:
                self._cache[key] = encoded[key]
                self._num_cached_tokens += len(text.token_ids)
        return [encoded[key] if key in encoded else self._cache[key] for key in keys]
