"""Finding stop strings in a completion while it grows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_rl_core.models.tokenizer import Tokenizer

__all__ = ["StopStrings"]

_REPLACEMENT = "\ufffd"
_MAX_PENDING = 8
"""Tokens held back for the rest of a character; no character has more bytes."""


class StopStrings:
    """Decodes a completion token by token and looks for stop strings, across token borders.

    Tokens are decoded behind a few earlier ones, because a tokenizer may drop or add a space at the start
    of a text; tokens that end inside a character wait for its rest.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        self._keep = max((len(s) for s in self._stop), default=1) - 1
        self._tail = ""
        self._context = 0
        self._read = 0

    def find(self, token_ids: list[int]) -> str | None:
        """The stop string that the newest of `token_ids` completed, if any.

        Called once after each token with all tokens so far.
        """
        known = self._decode(token_ids[self._context : self._read])
        text = self._decode(token_ids[self._context :])
        new = text[len(known) :]
        if text.endswith(_REPLACEMENT) and len(token_ids) - self._read < _MAX_PENDING:
            return self._search(self._tail + new)
        self._context, self._read = self._read, len(token_ids)
        stop = self._search(self._tail + new)
        self._tail = (self._tail + new)[-self._keep :] if self._keep else ""
        return stop

    def _search(self, text: str) -> str | None:
        hits = [(text.find(s) + len(s), s) for s in self._stop if s in text]
        return min(hits)[1] if hits else None

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)
