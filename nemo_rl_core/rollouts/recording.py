"""What an agent asks of a model over HTTP, kept as training sequences.

The agent speaks in messages; what is trained on are the tokens that the engine sampled. So a session remembers the
tokens behind each conversation: a call whose messages continue one that it answered continues its token sequence, and
one that does not (another conversation, a rewritten history, a second try) begins a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from attrs import define, evolve, field, frozen

from nemo_rl_core.data.message_log import ChatFormatter
from nemo_rl_core.errors import DataError
from nemo_rl_core.protocols.environment import Message
from nemo_rl_core.protocols.generation_backend import Completion
from nemo_rl_core.rollouts.records import Turn

__all__ = ["Asked", "RecordedSession", "normalized"]

_KEPT = ("role", "content", "name", "tool_call_id", "tool_calls")


def normalized(message: Mapping[str, Any]) -> Message:
    """A message of the chat API as one of ours: text parts joined, absent fields left out.

    Raises:
        DataError: It has no role, or holds something that is not text.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(f"A message is a mapping with a role and a content; found {message!r}.")
    kept: dict[str, Any] = {key: message[key] for key in _KEPT if message.get(key) is not None}
    content = kept.get("content", "")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise DataError("The content of a message may be text, or a list of text parts; images are not served.")
        content = "".join(str(part) for part in parts)
    return cast(Message, {**kept, "content": str(content)})


@define(eq=False)
class _Sequence:
    """A conversation and the tokens behind it."""

    messages: list[Message] = field(factory=list)
    token_ids: list[int] = field(factory=list)
    turns: list[Turn] = field(factory=list)


@frozen
class Asked:
    """A call that is being answered."""

    prompt_ids: list[int]
    """What the engine is given."""
    new: list[Turn]
    """What stands between the sequence so far and the answer."""
    messages: list[Message]
    """The conversation that was sent."""
    _sequence: _Sequence
    _length: int
    """Turns of the sequence when the call came."""


class RecordedSession:
    """The calls of one run of an agent.

    Args:
        chat: Renders conversations.
    """

    def __init__(self, chat: ChatFormatter) -> None:
        self._chat = chat
        self._sequences: list[_Sequence] = []

    @property
    def segments(self) -> list[list[Turn]]:
        """A list of turns for each training sequence, as in `Rollout.segments`."""
        return [list(sequence.turns) for sequence in self._sequences]

    def ask_chat(self, messages: Sequence[Mapping[str, Any]]) -> Asked:
        """A call with messages.

        Raises:
            DataError: There are none, or the chat template refuses them.
        """
        conversation = [normalized(message) for message in messages]
        if not conversation:
            raise DataError("There are no messages.")
        for known in sorted(self._sequences, key=lambda s: -len(s.messages)):
            count = len(known.messages)
            if 0 < count < len(conversation) and known.messages == conversation[:count]:
                added = conversation[count:]
                extension = self._chat.extend(known.messages, known.token_ids, added)
                if not extension.forked:
                    return self._asked(known, conversation, added, extension.token_ids)
                break
        return self._asked(_Sequence(), conversation, conversation, self._chat.initial(conversation))

    def ask_tokens(self, prompt_ids: Sequence[int]) -> Asked:
        """A call with a prompt of token ids; one that continues an answered sequence continues it here."""
        ids = list(prompt_ids)
        for known in sorted(self._sequences, key=lambda s: -len(s.token_ids)):
            count = len(known.token_ids)
            if not known.messages and 0 < count <= len(ids) and known.token_ids == ids[:count]:
                return self._asked(known, [], self._as_text(ids[count:]), ids[count:])
        return self._asked(_Sequence(), [], self._as_text(ids), ids)

    def _as_text(self, token_ids: list[int]) -> list[Message]:
        return [{"role": "user", "content": self._chat.decode(token_ids)}]

    def _asked(
        self, sequence: _Sequence, conversation: list[Message], added: list[Message], token_ids: list[int]
    ) -> Asked:
        turns = [Turn(message=message, token_ids=[], sampled=False) for message in added]
        turns[-1].token_ids = list(token_ids)
        return Asked([*sequence.token_ids, *token_ids], turns, conversation, sequence, len(sequence.turns))

    def answer(self, asked: Asked, completion: Completion, text: str) -> None:
        """Record the answer to a call.

        Args:
            asked: From `ask_chat` or `ask_tokens`.
            completion: What the engine sampled.
            text: What the agent was told; it will come back as the assistant's message.
        """
        sequence = asked._sequence
        if len(sequence.turns) != asked._length:  # another call has continued it meanwhile
            before = [evolve(turn, sampled=False, logprobs=[]) for turn in sequence.turns[: asked._length]]
            sequence = _Sequence(turns=before)
        message: Message = {"role": "assistant", "content": text}
        sampled = Turn(
            message=message,
            token_ids=completion.token_ids,
            sampled=True,
            logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
            weight_version=completion.weight_version,
            last_weight_version=completion.last_weight_version,
        )
        sequence.turns += [*asked.new, sampled]
        sequence.token_ids = [*asked.prompt_ids, *completion.token_ids]
        sequence.messages = [*asked.messages, message] if asked.messages else []
        if sequence not in self._sequences:
            self._sequences.append(sequence)
