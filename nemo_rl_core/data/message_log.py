"""Token ids of an episode: its prompt, and the tokens that each further turn appends.

Sampled tokens are never re-tokenised. The text that a chat template puts around them (turn closings, the
answers of an environment, the next generation prompt) is found by comparing two renderings and is
tokenised on its own.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from nemo_rl_core.errors import DataError
from nemo_rl_core.models.tokenizer import Tokenizer
from nemo_rl_core.records.message import Message

__all__ = ["ChatFormatter", "Extension", "apply_template"]

_CACHE_SIZE = 2048


@frozen
class Extension:
    """Continuation after a sampled turn."""

    token_ids: list[int]
    """Tokens to append after the sampled ones; for a fork, the whole new prompt."""
    forked: bool
    """The template rewrote the history, so the sequence so far is not a prefix of the new prompt."""


class ChatFormatter:
    """Turns messages into tokens by the tokenizer's chat template.

    Without a template the contents of the messages are joined as they are.

    Args:
        tokenizer: Its `chat_template` decides.
        chat_template_kwargs: Passed to the template, such as `{"enable_thinking": False}`.
    """

    def __init__(self, tokenizer: Tokenizer, *, chat_template_kwargs: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self._template_kwargs = dict(chat_template_kwargs or {})
        ends = set(getattr(tokenizer, "all_special_ids", ()))
        self._end_ids = frozenset(ends if tokenizer.eos_token_id is None else ends | {tokenizer.eos_token_id})
        self._prompts: OrderedDict[Any, tuple[int, ...]] = OrderedDict()
        self._texts: OrderedDict[Any, str] = OrderedDict()
        self._pieces: OrderedDict[Any, tuple[int, ...]] = OrderedDict()
        self._with_tools: OrderedDict[Any, ChatFormatter] = OrderedDict()

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> ChatFormatter:
        """A formatter whose conversations offer these tools.

        Args:
            tools: Descriptions of functions, as the chat API has them; with none it is this formatter.

        Raises:
            DataError: The chat template leaves tools out, so the policy would never hear of them.
        """
        if not tools:
            return self
        key = json.dumps(tools, sort_keys=True, default=repr)
        formatter = self._with_tools.get(key)
        if formatter is None:
            formatter = ChatFormatter(
                self.tokenizer, chat_template_kwargs={**self._template_kwargs, "tools": [dict(t) for t in tools]}
            )
            probe: list[Message] = [{"role": "user", "content": "x"}]
            if self.tokenizer.chat_template is None or formatter._render(probe) == self._render(probe):
                raise DataError(
                    "The chat template does not render tools, so the policy would not see them. Choose a model whose "
                    "template does, give a template as data.chat_template, or describe the tools in a message."
                )
            _remember(self._with_tools, key, formatter)
        return formatter

    def initial(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a prompt, the generation prompt included.

        Raises:
            DataError: The template refuses these messages.
        """
        key = _key(messages)
        token_ids = self._prompts.get(key)
        if token_ids is None:
            token_ids = tuple(self._tokenize_prompt(messages))
            _remember(self._prompts, key, token_ids)
        return list(token_ids)

    def extend(
        self, messages_before: Sequence[Message], prompt_ids_so_far: Sequence[int], new_messages: Sequence[Message]
    ) -> Extension:
        """Return the tokens to append after the policy's last message, for its next turn.

        The text in which the policy's last message was sampled, followed by that message, must open the
        new rendering, up to white space that a template strips; else the sequence forks.

        Args:
            messages_before: The conversation so far; the last message is the policy's.
            prompt_ids_so_far: The token sequence so far, the sampled tokens at its end.
            new_messages: The environment's answer.

        Raises:
            DataError: The template refuses these messages, or the last message is not the policy's.
        """
        if not messages_before or messages_before[-1].get("role") != "assistant":
            raise DataError("extend() continues after a message of the policy (role 'assistant').")
        messages = [*messages_before, *new_messages]
        before = self._render(messages_before[:-1])
        after = self._render(messages)
        content = str(messages_before[-1].get("content") or "")
        end = _match(after, len(before), content) if after.startswith(before) else None
        if end is None:
            return Extension(self.initial(messages), True)
        token_ids = self._encode(after[end:])
        # The engine keeps the end token it sampled; the template writes it too.
        if token_ids and prompt_ids_so_far and token_ids[0] == prompt_ids_so_far[-1] in self._end_ids:
            token_ids = token_ids[1:]
        return Extension(token_ids, False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of sampled tokens, special tokens left out."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    # -- one rendering --------------------------------------------------------------------------

    def _tokenize_prompt(self, messages: Sequence[Message]) -> list[int]:
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer.encode(_join(messages)))
        encoded = self._apply(messages, tokenize=True)
        ids = encoded["input_ids"] if isinstance(encoded, Mapping) or hasattr(encoded, "input_ids") else encoded
        return [int(i) for i in ids]

    def _render(self, messages: Sequence[Message]) -> str:
        """Text of the conversation with the generation prompt."""
        key = _key(messages)
        text = self._texts.get(key)
        if text is None:
            if self.tokenizer.chat_template is None:
                text = _join(messages)
            else:
                text = str(self._apply(messages, tokenize=False))
            _remember(self._texts, key, text)
        return text

    def _apply(self, messages: Sequence[Message], *, tokenize: bool) -> Any:
        return apply_template(
            self.tokenizer, messages, tokenize=tokenize, add_generation_prompt=True, **self._template_kwargs
        )

    def _encode(self, text: str) -> list[int]:
        token_ids = self._pieces.get(text)
        if token_ids is None:
            token_ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
            _remember(self._pieces, text, token_ids)
        return list(token_ids)


def apply_template(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, tokenize: bool, **options: object
) -> Any:
    """`tokenizer.apply_chat_template`, with an error that says what to do.

    Args:
        tokenizer: With a chat template.
        messages: The conversation.
        tokenize: Token ids instead of text.
        **options: Passed on, such as `add_generation_prompt`.

    Raises:
        DataError: The template refuses these messages.
    """
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=tokenize, **options)
    except Exception as error:  # jinja2 raises its own types, and whatever a template calls
        roles = [message.get("role") for message in messages]
        raise DataError(
            f"The chat template refused a conversation of roles {roles}: {type(error).__name__}: {error}. "
            "Check the messages, or give another template as data.chat_template."
        ) from error


def _join(messages: Sequence[Message]) -> str:
    return "".join(str(message.get("content") or "") for message in messages)


def _key(messages: Sequence[Message]) -> Any:
    """A hashable equal of the messages."""
    parts: list[Any] = []
    for message in messages:
        content = message.get("content")
        if len(message) == 2 and isinstance(content, str):
            parts.append((message.get("role"), content))
        else:
            parts.append(json.dumps(message, sort_keys=True, default=repr))
    return tuple(parts)


def _remember(cache: OrderedDict[Any, Any], key: object, value: object) -> None:
    cache[key] = value
    if len(cache) > _CACHE_SIZE:
        cache.popitem(last=False)


def _match(text: str, start: int, content: str) -> int | None:
    """Where `content` ends in `text` if it stands at `start`, white space aside; else None."""
    if text.startswith(content, start):
        return start + len(content)
    position = start
    for character in content:
        if character.isspace():
            continue
        while position < len(text) and text[position].isspace():
            position += 1
        if position >= len(text) or text[position] != character:
            return None
        position += 1
    return position
