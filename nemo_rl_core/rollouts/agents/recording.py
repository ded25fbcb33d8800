"""Recording of an agent's calls as training sequences.

The agent speaks in messages; what is trained on are the tokens that the engine sampled. So a session remembers the
tokens behind each conversation: a call whose messages continue one that it answered continues its token sequence, and
one that does not (another conversation, a rewritten history, other tools, a second try) begins a sequence of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from attrs import define, evolve, field, frozen

from nemo_rl_core.data.message_log import ChatFormatter
from nemo_rl_core.errors import DataError
from nemo_rl_core.records.completion import Completion
from nemo_rl_core.records.message import Message
from nemo_rl_core.records.rollout import Turn
from nemo_rl_core.records.tool_calls import with_parsed_arguments

__all__ = ["PendingCall", "RecordedAnswer", "RecordedSession", "normalized"]

_KEPT = ("role", "content", "name", "tool_call_id", "tool_calls")


def normalized(message: Mapping[str, Any]) -> Message:
    """A message of the chat API as one of ours: text parts joined, absent fields left out, arguments of tools read.

    Raises:
        DataError: It has no role, or holds something that is not text.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(f"A message is a mapping with a role and a content; found {message!r}.")
    kept: dict[str, Any] = {key: message[key] for key in _KEPT if message.get(key) not in (None, [])}
    content = kept.get("content", "")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise DataError("The content of a message may be text, or a list of text parts; images are not served.")
        content = "".join(str(part) for part in parts)
    if "tool_calls" in kept:
        if not isinstance(kept["tool_calls"], Sequence) or isinstance(kept["tool_calls"], str):
            raise DataError(f"tool_calls of a message is a list of calls; found {kept['tool_calls']!r:.200}.")
        kept["tool_calls"] = with_parsed_arguments(kept["tool_calls"])
    return cast(Message, {**kept, "content": str(content)})


def _key(message: Message) -> str:
    """Equal for messages that say the same, however a client writes them down."""
    calls = [
        (call.get("id"), call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls", ())
    ]
    said = (message["role"], message["content"], message.get("name"), message.get("tool_call_id"), calls)
    return json.dumps(said, sort_keys=True, default=repr)


@define(eq=False)
class _Sequence:
    """A conversation and the tokens behind it. Its lists are replaced, never changed."""

    chat: ChatFormatter
    keys: list[str] = field(factory=list)
    """The conversation as the agent knows it."""
    messages: list[Message] = field(factory=list)
    """The conversation as the policy said it."""
    token_ids: list[int] = field(factory=list)
    turns: list[Turn] = field(factory=list)


@frozen
class PendingCall:
    """A call that is not answered yet."""

    prompt_ids: list[int]
    """Prompt for the engine."""
    new: list[Turn]
    """Turns between the sequence so far and the answer."""
    keys: list[str]
    messages: list[Message]
    """The conversation that was sent."""
    _sequence: _Sequence
    _length: int
    """Number of turns in the sequence when the call came."""


@frozen(eq=False)
class RecordedAnswer:
    """An answer in the record, and the sequence before it."""

    sequence: _Sequence
    turns: list[Turn]
    """Turns of the sequence, including the answer."""
    before: _Sequence


class RecordedSession:
    """The calls of one run of an agent.

    Args:
        chat: Renders conversations.
    """

    def __init__(self, chat: ChatFormatter) -> None:
        self._chat = chat
        self._sequences: list[_Sequence] = []
        self._said: dict[str, Message] = {}

    @property
    def segments(self) -> list[list[Turn]]:
        """A list of turns for each training sequence, as in `Rollout.segments`."""
        return [list(sequence.turns) for sequence in self._sequences]

    def ask_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> PendingCall:
        """Start a call with messages, and with the tools that they may use.

        Raises:
            DataError: There are no messages, or the chat template refuses them or leaves the tools out.
        """
        conversation = [normalized(message) for message in messages]
        if not conversation:
            raise DataError("There are no messages.")
        chat = self._chat.with_tools(tools or ())
        keys = [_key(message) for message in conversation]
        for known in sorted(self._sequences, key=lambda s: -len(s.keys)):
            count = len(known.keys)
            if known.chat is chat and 0 < count < len(keys) and known.keys == keys[:count]:
                added = conversation[count:]
                try:
                    extension = chat.extend(known.messages, known.token_ids, added)
                except DataError:  # a template that wants the calls of tools apart from the text
                    break
                if not extension.forked:
                    return self._pending(known, keys, [*known.messages, *added], added, extension.token_ids)
                break
        as_said = [self._said.get(key, message) for key, message in zip(keys, conversation, strict=True)]
        try:
            token_ids = chat.initial(as_said)
        except DataError:
            as_said = conversation
            token_ids = chat.initial(as_said)
        return self._pending(_Sequence(chat), keys, as_said, as_said, token_ids)

    def ask_tokens(self, prompt_ids: Sequence[int]) -> PendingCall:
        """Start a call with a prompt of token ids; it may continue an answered sequence."""
        ids = list(prompt_ids)
        for known in sorted(self._sequences, key=lambda s: -len(s.token_ids)):
            count = len(known.token_ids)
            if not known.keys and 0 < count <= len(ids) and known.token_ids == ids[:count]:
                return self._pending(known, [], [], self._as_text(ids[count:]), ids[count:])
        return self._pending(_Sequence(self._chat), [], [], self._as_text(ids), ids)

    def _as_text(self, token_ids: list[int]) -> list[Message]:
        return [{"role": "user", "content": self._chat.decode(token_ids)}]

    def _pending(
        self,
        sequence: _Sequence,
        keys: list[str],
        conversation: list[Message],
        added: list[Message],
        token_ids: list[int],
    ) -> PendingCall:
        turns = [Turn(message=message, token_ids=[], sampled=False) for message in added]
        turns[-1].token_ids = list(token_ids)
        prompt_ids = [*sequence.token_ids, *token_ids]
        return PendingCall(prompt_ids, turns, keys, conversation, sequence, len(sequence.turns))

    def answer(
        self, pending: PendingCall, completion: Completion, text: str, told: Mapping[str, Any] | None = None
    ) -> RecordedAnswer:
        """Record the answer to a call.

        Args:
            pending: Call that `ask_chat` or `ask_tokens` returned.
            completion: Completion that the engine sampled.
            text: Text of the completion.
            told: Message that the agent got and will send back; None means one with `text`.

        Returns:
            The record of the answer, which `forget` takes.
        """
        sequence = pending._sequence
        if len(sequence.turns) != pending._length:  # another call has continued it meanwhile
            before = [evolve(turn, sampled=False, logprobs=[]) for turn in sequence.turns[: pending._length]]
            sequence = _Sequence(sequence.chat, turns=before)
        message: Message = {"role": "assistant", "content": text}
        sampled = Turn(
            message=message,
            token_ids=completion.token_ids,
            sampled=True,
            logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
            weight_version=completion.weight_version,
            last_weight_version=max(completion.weight_version, completion.last_weight_version),
        )
        recorded = RecordedAnswer(sequence, [*sequence.turns, *pending.new, sampled], evolve(sequence))
        sequence.turns = recorded.turns
        sequence.token_ids = [*pending.prompt_ids, *completion.token_ids]
        if pending.messages:
            key = _key(normalized(told or message))
            self._said[key] = message
            sequence.keys = [*pending.keys, key]
            sequence.messages = [*pending.messages, message]
        if sequence not in self._sequences:
            self._sequences.append(sequence)
        return recorded

    def forget(self, recorded: RecordedAnswer) -> None:
        """Remove an answer that nobody received; one that was continued meanwhile was received, and stays."""
        sequence, before = recorded.sequence, recorded.before
        if sequence.turns is not recorded.turns:
            return
        sequence.turns, sequence.token_ids = before.turns, before.token_ids
        sequence.keys, sequence.messages = before.keys, before.messages
        if not any(turn.sampled for turn in sequence.turns):
            self._sequences.remove(sequence)
