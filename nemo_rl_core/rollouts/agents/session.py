"""Session in which a program calls the policy itself: every call is sampled, checked and recorded."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from attrs import define, evolve, field

from nemo_rl_core.data.message_log import ChatFormatter
from nemo_rl_core.errors import DataError, DeadlineExceeded, GenerationError
from nemo_rl_core.protocols.generation_backend import GenerationRequest, SamplingParams
from nemo_rl_core.protocols.policy import CallRefused, PolicyCall, PolicyChoice
from nemo_rl_core.records.completion import Completion
from nemo_rl_core.records.rollout import Turn
from nemo_rl_core.records.seeds import stable_seed
from nemo_rl_core.records.tool_calls import parse_tool_calls
from nemo_rl_core.rollouts.agents.recording import PendingCall, RecordedAnswer, RecordedSession

__all__ = ["EngineAnswer", "EngineSession", "check_completion"]

_MOST_CHOICES = 128


@define(eq=False)
class EngineAnswer:
    """The answer to a call. It is not trained on unless it is recorded."""

    number: int
    """Number of the call in its session, from 0."""
    prompt_ids: list[int]
    choices: list[PolicyChoice]
    _session: EngineSession
    _pending: PendingCall
    _place: tuple[bytes, int] | None
    _recorded: list[RecordedAnswer] = field(factory=list)

    def record(self) -> EngineAnswer:
        """Record the answer in this episode: the caller has received it, or is about to."""
        if not self._recorded:
            for choice in self.choices:
                kept = self._session._record.answer(self._pending, choice.completion, choice.text, choice.message)
                self._recorded.append(kept)
        return self

    def discard(self) -> None:
        """Drop an answer that nobody received: it is not trained on, and a repeated call gets the same answer."""
        for kept in reversed(self._recorded):
            self._session._record.forget(kept)
        self._recorded.clear()
        self._session._give_back(self._place)
        self._place = None


class EngineSession:
    """The calls of one episode.

    What is sampled depends on the session's seed, the prompt, and how often the session has sent it before; not on
    the order of calls with other prompts, or on other sessions.

    Args:
        generate: Samples one completion.
        chat: Renders conversations.
        sampling: How the run samples.
        max_sequence_length: Tokens of prompt and answer together.
        seed: Of everything that is sampled in it.
        name: In request ids and messages.
        timeout_s: Deadline of one call.
        max_calls: More are refused; None is no limit.
        order: Where waiting requests stand; see `GenerationRequest.order`.

    Attributes:
        failure: The engine failed the last call with this, and none has succeeded since.
        refused: The last `CallRefused` that the session raised while it was open.
        generation_s: Seconds in which at least one call was under way.
    """

    def __init__(
        self,
        generate: Callable[[GenerationRequest], Awaitable[Completion]],
        chat: ChatFormatter,
        *,
        sampling: SamplingParams,
        max_sequence_length: int,
        seed: int,
        name: str = "session",
        timeout_s: float = 600.0,
        max_calls: int | None = None,
        order: tuple[int, ...] = (),
    ) -> None:
        self._generate = generate
        self._chat = chat
        self._sampling = sampling
        self._max_length = max_sequence_length
        self._seed = seed
        self._name = name
        self._timeout_s = timeout_s
        self._max_calls = max_calls
        self._order = order
        self._record = RecordedSession(chat)
        self._number = 0
        self._num_taken = 0
        self._places: dict[bytes, set[int]] = {}
        self._active: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._busy_since = 0.0
        self.failure: Exception | None = None
        self.refused: CallRefused | None = None
        self.generation_s = 0.0

    @property
    def segments(self) -> list[list[Turn]]:
        """What is recorded: a list of turns for each training sequence, as in `Rollout.segments`."""
        return self._record.segments

    def close(self) -> None:
        """End the calls in flight and refuse new ones; may be called twice."""
        self._closed = True
        current = asyncio.current_task() if self._active else None
        for task in self._active - {current}:
            task.cancel()

    def decode(self, token_id: int) -> str:
        """Text of one token."""
        return str(self._chat.tokenizer.decode([token_id]))

    async def ask(self, call: PolicyCall) -> EngineAnswer:
        """Sample the answer to a call; `record` it once it is used.

        Raises:
            DataError: The call cannot be understood.
            CallRefused: The context is full, the session has had its turns, or it is closed.
            DeadlineExceeded: There was no answer in `timeout_s`.
            GenerationError: The engine cut the answer off, or gave one that cannot be trained on.
        """
        if self._closed:
            raise CallRefused(f"{self._name} is over; it no longer accepts calls.", "session_closed")
        pending = self._understood(call)
        self._check_limits(pending)
        number, self._number = self._number, self._number + 1
        place = self._take(pending.prompt_ids)
        task = asyncio.current_task()
        assert task is not None
        self._begin(task)
        try:
            sampling = self._sampling_of(call, pending)
            completions = await self._sample(pending, sampling, call, place, number)
            choices = [self._choice(c, call, stable_seed(self._seed, number, i)) for i, c in enumerate(completions)]
        except BaseException as error:
            self._give_back(place)
            if isinstance(error, Exception) and not isinstance(error, DataError):
                self.failure = error
            raise
        finally:
            self._end(task)
        self.failure = None
        return EngineAnswer(number, pending.prompt_ids, choices, self, pending, place)

    # -- before and after the engine ---------------------------------------------------------------------

    def _understood(self, call: PolicyCall) -> PendingCall:
        if type(call.n) is not int or not 1 <= call.n <= _MOST_CHOICES:
            raise DataError(f"n must be a whole number from 1 to {_MOST_CHOICES}.")
        if call.messages is not None:
            return self._record.ask_chat(call.messages, call.tools)
        if call.prompt is None:
            raise DataError("A call needs messages or a prompt.")
        prompt = call.prompt
        ids = self._chat.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise DataError("The prompt is empty: no tokens.")
        return self._record.ask_tokens(ids)

    def _check_limits(self, pending: PendingCall) -> None:
        if self._max_calls is not None and self._num_taken >= self._max_calls:
            raise self._refusal(
                f"{self._name} has had its {self._max_calls} calls (rollouts.max_turns): raise it, or have the agent "
                "end earlier.",
                "max_turns_exceeded",
            )
        if len(pending.prompt_ids) >= self._max_length:
            raise self._refusal(
                f"The prompt has {len(pending.prompt_ids)} tokens and leaves no room in a context of "
                f"{self._max_length} (policy.max_sequence_length).",
                "context_length_exceeded",
            )

    def _refusal(self, message: str, code: str) -> CallRefused:
        self.refused = CallRefused(message, code)
        return self.refused

    def _sampling_of(self, call: PolicyCall, pending: PendingCall) -> SamplingParams:
        room = self._max_length - len(pending.prompt_ids)
        wanted = self._sampling.max_new_tokens if call.max_new_tokens is None else call.max_new_tokens
        return evolve(self._sampling, max_new_tokens=max(1, min(wanted, room)), stop=(*self._sampling.stop, *call.stop))

    async def _sample(
        self, pending: PendingCall, sampling: SamplingParams, call: PolicyCall, place: tuple[bytes, int], number: int
    ) -> list[Completion]:
        drawn = ("again", place[1]) if call.seed is None else ("seed", call.seed)
        seeds = [stable_seed(self._seed, place[0].hex(), *drawn, i) for i in range(call.n)]
        requests = [
            GenerationRequest(
                request_id=f"{self._name}/{number}/{i}",
                prompt_ids=pending.prompt_ids,
                sampling=evolve(sampling, seed=seed),
                order=(*self._order, number) if self._order else (),
            )
            for i, seed in enumerate(seeds)
        ]
        try:
            async with asyncio.timeout(self._timeout_s) as deadline:
                completions = await _all(self._generate, requests)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise DeadlineExceeded(f"{self._name} had no answer to a call within {self._timeout_s:g} s.") from error
        for completion in completions:
            check_completion(completion)
        return completions

    def _choice(self, completion: Completion, call: PolicyCall, seed: int) -> PolicyChoice:
        text = completion.text if completion.text is not None else self._chat.decode(completion.token_ids)
        if isinstance(completion.stop_reason, str):
            text = text.partition(completion.stop_reason)[0]
        message: dict[str, Any] = {"role": "assistant", "content": text}
        content, calls = parse_tool_calls(text, seed=seed) if call.tools else (text, [])
        if calls:
            told = calls[:1] if call.single_tool_call else calls
            message = {"role": "assistant", "content": content or None, "tool_calls": told}
        return PolicyChoice(message=message, text=text, completion=completion)

    # -- counts ------------------------------------------------------------------------------------------

    def _take(self, prompt_ids: Sequence[int]) -> tuple[bytes, int]:
        """How often this prompt has been pending: the first number that no answer of it has."""
        digest = blake2b(np.asarray(prompt_ids, dtype=np.int64).tobytes(), digest_size=16).digest()
        taken = self._places.setdefault(digest, set())
        number = next(i for i in range(len(taken) + 1) if i not in taken)
        taken.add(number)
        self._num_taken += 1
        return digest, number

    def _give_back(self, place: tuple[bytes, int] | None) -> None:
        if place is not None:
            self._places[place[0]].discard(place[1])
            self._num_taken -= 1

    def _begin(self, task: asyncio.Task[Any]) -> None:
        if not self._active:
            self._busy_since = time.monotonic()
        self._active.add(task)

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._active.discard(task)
        if not self._active:
            self.generation_s += time.monotonic() - self._busy_since


async def _all(
    generate: Callable[[GenerationRequest], Awaitable[Completion]], requests: Sequence[GenerationRequest]
) -> list[Completion]:
    """Sample all of them; when one fails, the others are given up."""
    if len(requests) == 1:
        return [await generate(requests[0])]
    tasks = [asyncio.ensure_future(generate(request)) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def check_completion(completion: Completion) -> None:
    """A completion that cannot be trained on is a failure of the engine, not data.

    Raises:
        GenerationError: Cut off, or its logprobs are missing or not finite.
    """
    if completion.finish_reason == "abort":
        raise GenerationError("The engine cut the completion off (finish reason 'abort').")
    if len(completion.logprobs) != len(completion.token_ids):
        raise GenerationError(
            f"The engine returned {len(completion.token_ids)} tokens with {len(completion.logprobs)} logprobs."
        )
    if not math.isfinite(sum(completion.logprobs)):
        raise GenerationError("The engine returned a logprob that is not finite.")
