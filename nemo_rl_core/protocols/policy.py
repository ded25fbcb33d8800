"""The policy as agents and environments call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from attrs import frozen

from nemo_rl_core.errors import NemoRLError
from nemo_rl_core.records.completion import Completion
from nemo_rl_core.records.rollout import Turn

__all__ = ["CallRefused", "PolicyAnswer", "PolicyCall", "PolicyChoice", "PolicySession"]


class CallRefused(NemoRLError, RuntimeError):
    """Raised if the session no longer accepts this call.

    Attributes:
        code: `context_length_exceeded`, `max_turns_exceeded` or `session_closed`.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@frozen(kw_only=True)
class PolicyCall:
    """One call of the policy, with messages or a prompt. Temperature, top-p and top-k are the run's."""

    messages: Sequence[Mapping[str, Any]] | None = None
    """Conversation that the chat template renders."""
    prompt: str | Sequence[int] | None = None
    """Text or token ids, used without a template."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions that the policy may call, as the chat API describes them; the answer's calls of them are parsed."""
    single_tool_call: bool = False
    """Whether to report only the first of several tool calls in one answer."""
    n: int = 1
    """Number of answers to sample."""
    max_new_tokens: int | None = None
    """Maximum tokens of one answer; None means the run's. The room left in the context limits it further."""
    stop: tuple[str, ...] = ()
    """Stop texts in addition to those of the run."""
    seed: int | None = None
    """Seed of the answers. Within a session, equal prompt and seed get equal answers. Other sessions get other answers
    all the same, because the rollouts of a group must differ."""


@frozen(kw_only=True)
class PolicyChoice:
    """One sampled answer."""

    message: dict[str, Any]
    """The assistant's message in the format of the chat API."""
    text: str
    """Whole text of the answer, without special tokens, up to the stop text."""
    completion: Completion

    @property
    def finish_reason(self) -> str:
        """Reason why the answer ended: "length", "tool_calls" if it calls tools, or "stop"."""
        if self.completion.finish_reason == "length":
            return "length"
        return "tool_calls" if self.message.get("tool_calls") else "stop"


class PolicyAnswer(Protocol):
    """The answer to one call. It is not trained on unless it is recorded."""

    number: int
    """Number of the call in its session, from 0."""
    prompt_ids: list[int]
    choices: list[PolicyChoice]

    def record(self) -> PolicyAnswer:
        """Record the answer in this episode: the caller has received it, or is about to."""
        ...

    def discard(self) -> None:
        """Drop an answer that nobody received: it is not trained on, and a repeated call gets the same answer."""
        ...


class PolicySession(Protocol):
    """Access to the policy for one episode. The rollout engine gives it to an environment that makes its own calls.

    Attributes:
        failure: Error with which the engine failed the last call; None once a later call has succeeded.
        refused: Last `CallRefused` that the session raised while it was open.
    """

    failure: Exception | None
    refused: CallRefused | None

    @property
    def segments(self) -> list[list[Turn]]:
        """Recorded turns, one list for each training sequence, as in `Rollout.segments`."""
        ...

    async def ask(self, call: PolicyCall) -> PolicyAnswer:
        """Sample the answer to a call; call `record` on it once it is used.

        Raises:
            DataError: The call cannot be understood.
            CallRefused: The context is full, the session has used its turns, or it is closed.
            DeadlineExceeded: There was no answer in time.
            GenerationError: The engine cut the answer off, or gave one that cannot be trained on.
        """
        ...

    def decode(self, token_id: int) -> str:
        """Return the text of one token."""
        ...

    def close(self) -> None:
        """End the calls in flight and refuse new ones; may be called twice."""
        ...
