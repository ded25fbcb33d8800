"""Tokenisation of pieces of text with a mask, many conversations at a time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from attrs import frozen

from nemo_rl_core.data.conversation import Piece
from nemo_rl_core.models.tokenizer import Tokenizer

__all__ = ["TokenizedText", "tokenize_pieces"]


@frozen
class TokenizedText:
    """One conversation as tokens."""

    token_ids: list[int]
    trained: list[bool]
    """One for each token."""


def tokenize_pieces(tokenizer: Tokenizer, conversations: Sequence[Sequence[Piece]]) -> list[TokenizedText]:
    """Tokenise conversations and mark the trained tokens.

    The text is tokenised whole, and the mask read from the characters each token covers. Where a token
    would reach over the border of two pieces (" " + "4" is one token to some tokenizers) the pieces are
    tokenised on their own: so the policy meets the prompt, too, when it samples.

    Args:
        tokenizer: Of Hugging Face; one without character offsets tokenises all pieces on their own.
        conversations: From `ConversationSplitter.split`.
    """
    if tokenizer.chat_template is None or not getattr(tokenizer, "is_fast", False):
        return [_by_pieces(tokenizer, pieces) for pieces in conversations]
    if not conversations:
        return []
    tokenize: Any = tokenizer
    encoded = tokenize(
        ["".join(piece.text for piece in pieces) for pieces in conversations],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return [
        _from_offsets(pieces, token_ids, offsets) or _by_pieces(tokenizer, pieces)
        for pieces, token_ids, offsets in zip(
            conversations, encoded["input_ids"], encoded["offset_mapping"], strict=True
        )
    ]


def _from_offsets(
    pieces: Sequence[Piece], token_ids: list[int], offsets: Sequence[tuple[int, int]]
) -> TokenizedText | None:
    """The mask by characters, or None if a token reaches over a border."""
    borders = list(accumulate((len(piece.text) for piece in pieces), initial=0))
    starts = [start for start, _ in offsets]
    cuts = [bisect_left(starts, border) for border in borders]
    # Some tokenizers leave the space in front of a word out of its offset: then the token before ends early.
    if any(offsets[cut - 1][1] != border for cut, border in zip(cuts[1:-1], borders[1:-1], strict=True) if cut):
        return None
    trained: list[bool] = []
    for piece, first, last in zip(pieces, cuts, [*cuts[1:-1], len(token_ids)], strict=False):
        trained += [piece.trained] * (last - first)
    return TokenizedText(token_ids, trained)


def _by_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> TokenizedText:
    token_ids: list[int] = []
    trained: list[bool] = []
    for number, piece in enumerate(pieces):
        # Without a template the prompt gets what the tokenizer puts in front, as it does for rollouts.
        special = number == 0 and tokenizer.chat_template is None
        piece_ids = list(tokenizer.encode(piece.text, add_special_tokens=special))
        if piece.ends_turn and tokenizer.eos_token_id is not None:
            piece_ids.append(tokenizer.eos_token_id)
        token_ids += piece_ids
        trained += [piece.trained] * len(piece_ids)
    return TokenizedText(token_ids, trained)
