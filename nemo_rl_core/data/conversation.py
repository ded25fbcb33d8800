"""Splitting of conversations into pieces of text, each trained or not.

What belongs to an assistant turn is found by comparing renderings: the conversation before it with the
generation prompt, the conversation up to its end, and the whole. So any chat template will do, and what
the policy is trained on is what it would have to sample: the turn with its end token, without its header.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from attrs import frozen

from nemo_rl_core.data.message_log import apply_template
from nemo_rl_core.errors import DataError
from nemo_rl_core.models.tokenizer import Tokenizer

__all__ = ["ConversationSplitter", "Piece", "TrainOn"]

TrainOn = Literal["assistant", "last_assistant", "all"]


@frozen
class Piece:
    """Consecutive text, all of it trained or none."""

    text: str
    trained: bool
    ends_turn: bool = False
    """An end-of-sequence token is to follow, which the text itself does not hold."""


class ConversationSplitter:
    """Renders conversations and splits them at the borders of what is trained.

    Without a chat template the contents of the messages are joined as they are, as for rollouts, and an
    end-of-sequence token follows each assistant turn.

    Args:
        tokenizer: Its `chat_template` decides.
        train_on: "assistant", "last_assistant" or "all".
        chat_template_kwargs: Passed to the template.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, train_on: TrainOn, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        self._kwargs = dict(chat_template_kwargs or {})
        self._end_text: str | None = getattr(tokenizer, "eos_token", None)

    def split(self, messages: Sequence[Mapping[str, Any]]) -> list[Piece]:
        """The pieces, in order; joined they are the rendered conversation.

        Raises:
            DataError: The template refuses the messages, or rewrites what stands before a trained turn.
        """
        turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if self.train_on == "last_assistant":
            turns = turns[-1:]
        if self.tokenizer.chat_template is None:
            return self._plain_pieces(messages, turns)
        text = self._render(messages)
        if self.train_on == "all":
            return [Piece(text, True)]
        pieces: list[Piece] = []
        done = 0
        for turn in turns:
            start, end = self._extent(messages, turn, text)
            pieces += [Piece(text[done:start], False), Piece(text[start:end], True)]
            done = end
        pieces.append(Piece(text[done:], False))
        return [piece for piece in pieces if piece.text]

    def _extent(self, messages: Sequence[Mapping[str, Any]], turn: int, text: str) -> tuple[int, int]:
        """Where the turn that the policy samples begins and ends in the rendered text."""
        if turn == 0:
            raise DataError(
                "The conversation begins with an assistant message, so nothing prompts it. Put a user or system "
                "message first, or set train_on to 'all'."
            )
        before = self._render(messages[:turn], add_generation_prompt=True)
        through = text if turn == len(messages) - 1 else self._render(messages[: turn + 1])
        if not (text.startswith(through) and through.startswith(before)):
            raise DataError(
                f"The chat template writes the conversation before message {turn} (assistant) differently once more "
                "messages follow, as templates do that drop earlier reasoning. What the policy would be prompted with "
                "is then not what it is trained after. Set train_on to 'last_assistant', give a template that keeps "
                "the history as data.chat_template, or train on the whole text with train_on: all."
            )
        end = len(through)
        if self._end_text:  # a template may write more after the end token, such as a line break
            last = through.rfind(self._end_text, len(before))
            end = end if last < 0 else last + len(self._end_text)
        return len(before), end

    def _plain_pieces(self, messages: Sequence[Mapping[str, Any]], turns: Sequence[int]) -> list[Piece]:
        trained = range(len(messages)) if self.train_on == "all" else turns
        pieces = [
            Piece(str(message.get("content") or ""), i in trained, message.get("role") == "assistant")
            for i, message in enumerate(messages)
        ]
        return [piece for piece in pieces if piece.text or piece.ends_turn]

    def _render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        return str(
            apply_template(
                self.tokenizer, messages, tokenize=False, add_generation_prompt=add_generation_prompt, **self._kwargs
            )
        )
