"""The policy, as agents and environments ask it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from attrs import frozen

from nemo_rl_core.errors import NemoRLError
from nemo_rl_core.records.completion import Completion
from nemo_rl_core.records.rollout import Turn

__all__ = ["CallRefused", "PolicyAnswer", "PolicyCall", "PolicyChoice", "PolicySession"]


class CallRefused(NemoRLError, RuntimeError):
    """The session takes this call no more.

    Attributes:
        code: `context_length_exceeded`, `max_turns_exceeded` or `session_closed`.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@frozen(kw_only=True)
class PolicyCall:
    """One call: messages, or a prompt. Temperature, top-p and top-k are the run's."""

    messages: Sequence[Mapping[str, Any]] | None = None
    """A conversation, rendered by the chat template."""
    prompt: str | Sequence[int] | None = None
    """Text or token ids, taken as they are."""
    tools: Sequence[Mapping[str, Any]] = ()
    """What the policy may call, as the chat API describes functions; its calls are then read out of the answer."""
    single_tool_call: bool = False
    """Tell only the first of several calls of tools in one answer."""
    n: int = 1
    """Answers to sample."""
    max_new_tokens: int | None = None
    """Of one answer; None is the run's. What the context leaves is the limit above it."""
    stop: tuple[str, ...] = ()
    """Beside those of the run."""
    seed: int | None = None
    """Calls of a session with equal prompt and seed get equal answers. Another session draws others all the same:
    the rollouts of a group must differ."""


@frozen(kw_only=True)
class PolicyChoice:
    """One sampled answer."""

    message: dict[str, Any]
    """The assistant's message as the chat API has it."""
    text: str
    """All that the policy said, without special tokens, up to the stop string."""
    completion: Completion

    @property
    def finish_reason(self) -> str:
        """stop, length, or tool_calls if there are some."""
        if self.completion.finish_reason == "length":
            return "length"
        return "tool_calls" if self.message.get("tool_calls") else "stop"


class PolicyAnswer(Protocol):
    """The answer to one call. Nothing of it is trained on before `record`."""

    number: int
    """Of the call in its session, from 0."""
    prompt_ids: list[int]
    choices: list[PolicyChoice]

    def record(self) -> PolicyAnswer:
        """Keep it as sampled by this episode: whoever asked has got it, or is about to."""
        ...

    def discard(self) -> None:
        """Nobody got it: it is not trained on, and whoever asks the same again gets the same."""
        ...


class PolicySession(Protocol):
    """The calls of one episode, which the rollout engine lends to an environment that asks the policy itself.

    Attributes:
        failure: The engine failed the last call with this, and none has succeeded since.
        refused: The last `CallRefused` that the session raised while it was open.
    """

    failure: Exception | None
    refused: CallRefused | None

    @property
    def segments(self) -> list[list[Turn]]:
        """What is recorded: a list of turns for each training sequence, as in `Rollout.segments`."""
        ...

    async def ask(self, call: PolicyCall) -> PolicyAnswer:
        """Sample the answer to a call; `record` it once it is used.

        Raises:
            DataError: The call cannot be understood.
            CallRefused: The context is full, the session has had its turns, or it is closed.
            DeadlineExceeded: There was no answer in time.
            GenerationError: The engine cut the answer off, or gave one that cannot be trained on.
        """
        ...

    def decode(self, token_id: int) -> str:
        """Text of one token."""
        ...

    def close(self) -> None:
        """End the calls under way and take no more; may be called twice."""
        ...
