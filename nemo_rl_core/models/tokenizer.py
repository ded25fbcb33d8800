"""The part of a Hugging Face tokenizer that the framework uses."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

__all__ = ["Tokenizer"]


class Tokenizer(Protocol):
    """Satisfied by every `transformers.PreTrainedTokenizerBase`."""

    eos_token_id: int | None
    pad_token_id: int | None
    chat_template: str | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Convert text to token ids."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Convert token ids to text."""
        ...

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, Any]], **kwargs: object
    ) -> str | list[int] | Mapping[str, Any]:
        """Render messages by the template, to text or token ids."""
        ...

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> object:
        """Write the tokenizer into a folder."""
        ...
