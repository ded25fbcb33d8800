"""One episode: prompt, completion, answer, and so on until it ends; then it is closed, whatever happened."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar, TypeVarTuple, Unpack

from attrs import frozen

from nemo_rl_core.data.message_log import ChatFormatter
from nemo_rl_core.errors import (
    DeadlineExceeded,
    EnvironmentFailure,
    GenerationError,
    NemoRLError,
    RewardError,
)
from nemo_rl_core.machine.task_deadlines import DeadlineWatch, TaskDeadline
from nemo_rl_core.protocols.environment import DrivingEnvironment, Environment, EnvironmentStep
from nemo_rl_core.protocols.generation_backend import GenerationBackend, GenerationRequest, SamplingParams
from nemo_rl_core.records.completion import Completion
from nemo_rl_core.records.message import Message
from nemo_rl_core.records.rewards import finite_rewards
from nemo_rl_core.records.rollout import Rollout, RolloutError, Turn
from nemo_rl_core.records.seeds import stable_seed
from nemo_rl_core.registry import PluginCall, blame, contained, origin_of, provider_of
from nemo_rl_core.rollouts.agents.session import EngineSession, check_completion
from nemo_rl_core.rollouts.context import EnvironmentFactory, EpisodeContext
from nemo_rl_core.rollouts.traffic import GenerationTraffic
from nemo_rl_core.schema import RolloutConfig

__all__ = ["Episode", "EpisodeSettings"]

_log = logging.getLogger(__name__)
_Stage = Literal["reset", "generate", "step", "score", "close"]
_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")
_DEADLINE_OF_TURNS = "rollouts.max_turns x (generation_timeout_s + environment_timeout_s)"


@frozen(kw_only=True, eq=False)
class EpisodeSettings:
    """What all episodes of an engine share."""

    environment: EnvironmentFactory
    generation: GenerationBackend
    chat: ChatFormatter
    config: RolloutConfig
    max_sequence_length: int
    traffic: GenerationTraffic
    """Counts the episodes that wait for the generation backend."""


class Episode:
    """The running of one rollout; `run` may be called once.

    Args:
        settings: What all episodes share.
        rollout: The record to fill.
        group_id: For messages and for the order of waiting requests.
        environment_seed: One for the whole group.
        context: Lent to the environment.
        sampling: How completions are drawn.
        asked: The event loop's `time()` when the group was asked for.
    """

    def __init__(
        self,
        settings: EpisodeSettings,
        rollout: Rollout,
        *,
        group_id: int,
        environment_seed: int,
        context: EpisodeContext,
        sampling: SamplingParams,
        asked: float,
    ) -> None:
        self.settings = settings
        self.config = settings.config
        self.chat = settings.chat
        self.rollout = rollout
        self.group_id = group_id
        self.environment_seed = environment_seed
        self.context = context
        self.sampling = sampling
        self.asked = asked
        self._messages: list[Message] = []
        self._token_ids: list[int] = []
        self._stage: _Stage = "reset"
        self._generation_s = 0.0
        self._environment_s = 0.0
        self._deadline: TaskDeadline
        self._now = asyncio.get_running_loop().time

    @property
    def name(self) -> str:
        """How messages call this rollout."""
        return f"rollout {self.group_id}/{self.rollout.index}"

    async def run(self, watch: DeadlineWatch) -> Rollout:
        """Play the episode. Every failure is recorded in the rollout; only a cancellation is raised."""
        task = asyncio.current_task()
        assert task is not None
        self._deadline = self.context.deadline = TaskDeadline(task)
        watch.add(self._deadline)
        try:
            return await self._run(task)
        finally:
            watch.remove(self._deadline)

    async def _run(self, task: asyncio.Task[Any]) -> Rollout:
        rollout = self.rollout
        started = self._now()
        environment: Environment | None = None
        try:
            with PluginCall("environments", self.settings.environment, "__init__", "made"):
                environment = self.settings.environment(self.context)
            with contained("environments", self.settings.environment, "call"):  # such as a property that exits
                await self._play(environment)
        except asyncio.CancelledError as error:
            if task.cancelling():
                raise
            self._fail(EnvironmentFailure(f"A task inside the episode was cancelled: {error}"))
        except Exception as error:
            self._fail(error)
        finally:
            if environment is not None:
                await self._close(environment)
            ended = self._now()
            rollout.timing_s = {
                "generation": self._generation_s,
                "environment": self._environment_s,
                "queue": started - self.asked,
                "total": ended - self.asked,
            }
        return rollout

    # -- the turns ------------------------------------------------------------------------------

    async def _play(self, environment: Environment) -> None:
        if isinstance(environment, DrivingEnvironment):
            await self._be_driven(environment)
            return
        prompt = await self._call("reset", environment.reset, self.rollout.task, self.environment_seed)
        self._begin(_checked_prompt(prompt, environment.reset))
        for turn in range(self.config.max_turns):
            completion = await self._generate(turn)
            message = self._append_sampled(completion)
            self.context.completion_ids = completion.token_ids
            step = _checked_step(await self._call("step", environment.step, message), environment.step)
            self._record(step)
            last = turn + 1 == self.config.max_turns or completion.finish_reason == "length"
            if self._ends(step, last) or not self._continue_with(step.messages):
                return

    async def _be_driven(self, environment: DrivingEnvironment) -> None:
        """Lend the policy to an environment that asks by itself; what it asked becomes the rollout."""
        config, rollout = self.config, self.rollout
        session = EngineSession(
            self._sample_for_session,
            self.chat,
            sampling=self.sampling,
            max_sequence_length=self.settings.max_sequence_length,
            seed=rollout.seed,
            name=f"{self.group_id}/{rollout.rollout_id}",
            timeout_s=config.generation_timeout_s,
            max_calls=config.max_turns,
            order=(self.group_id, rollout.index),
        )
        limit_s = config.max_turns * (config.generation_timeout_s + config.environment_timeout_s)
        try:
            result = await self._call(
                "step", environment.drive, rollout.task, self.environment_seed, session, limit_s=limit_s
            )
        except Exception as error:
            if session.failure is not None:  # whatever the environment made of it
                raise session.failure from error
            raise
        finally:
            session.close()
            rollout.segments = session.segments
            self._generation_s = session.generation_s
            self._environment_s = max(0.0, self._environment_s - session.generation_s)
        step = _checked_step(result, environment.drive)
        if session.failure is not None:  # the agent may have taken it for an answer
            raise session.failure
        if not rollout.num_sampled_tokens:
            raise EnvironmentFailure("The environment made no call of the policy, so there is nothing to train on.")
        self._record(step)
        last = [segment[-1] for segment in rollout.segments]
        cut = session.refused is not None or any(turn.finish_reason == "length" for turn in last)
        rollout.truncated = step.truncated or cut
        rollout.terminated = not step.truncated

    async def _sample_for_session(self, request: GenerationRequest) -> Completion:
        await self.settings.traffic.enter()
        try:
            with PluginCall("generation_backends", self.settings.generation, "generate"):
                return await self.settings.generation.generate(request)
        finally:
            self.settings.traffic.leave()

    def _begin(self, messages: list[Message]) -> None:
        self._stage = "reset"
        if not messages:
            raise EnvironmentFailure("The environment's reset returned no messages, so there is no prompt.")
        self._messages = messages
        self._token_ids = self.chat.initial(messages)
        self.rollout.segments.append(_unsampled(messages, list(self._token_ids)))
        self._stage = "generate"
        if not self._token_ids:
            raise GenerationError("The prompt is empty: no tokens. Give the row a prompt.")
        if self._room <= 0:
            raise GenerationError(
                f"The prompt has {len(self._token_ids)} tokens and leaves no room in a sequence of "
                f"{self.settings.max_sequence_length}. Raise policy.max_sequence_length or shorten the prompt."
            )

    @property
    def _room(self) -> int:
        return self.settings.max_sequence_length - len(self._token_ids)

    async def _generate(self, turn: int) -> Completion:
        self._stage = "generate"
        request = GenerationRequest(
            request_id=f"{self.group_id}/{self.rollout.rollout_id}/{turn}",
            prompt_ids=self._token_ids,
            sampling=_for_turn(self.sampling, self._room, stable_seed(self.rollout.seed, turn)),
            order=(self.group_id, self.rollout.index, turn),
        )
        await self.settings.traffic.enter()
        started = self._now()
        try:
            with PluginCall("generation_backends", self.settings.generation, "generate"):
                completion = await self._deadline.wait(
                    self.settings.generation.generate(request), self.config.generation_timeout_s
                )
        except TimeoutError as error:
            if error.args or isinstance(error, NemoRLError):
                raise  # the engine's own
            raise DeadlineExceeded(
                f"generation of {self.name} (turn {turn}) passed its deadline of "
                f"{self.config.generation_timeout_s:g} s (rollouts.generation_timeout_s)."
            ) from error
        finally:
            self.settings.traffic.leave()
            self._generation_s += self._now() - started
        check_completion(completion)
        return completion

    def _append_sampled(self, completion: Completion) -> Message:
        text = completion.text
        if text is None:
            text = self.chat.decode(completion.token_ids) if completion.token_ids else ""
        message: Message = {"role": "assistant", "content": text}
        self._messages.append(message)
        # A new list: the engine may still hold the one that it was given as a prompt.
        self._token_ids = self._token_ids + completion.token_ids
        self.rollout.segments[-1].append(
            Turn(
                message=message,
                token_ids=completion.token_ids,
                sampled=True,
                logprobs=completion.logprobs,
                finish_reason=completion.finish_reason,
                weight_version=completion.weight_version,
                last_weight_version=max(completion.weight_version, completion.last_weight_version),
            )
        )
        return message

    def _record(self, step: EnvironmentStep) -> None:
        self._stage = "score"
        totals = self.rollout.rewards
        for name, value in finite_rewards(step.rewards).items():
            totals[name] = totals.get(name, 0.0) + value
        self.rollout.info.update(step.info)
        self._stage = "step"

    def _ends(self, step: EnvironmentStep, last: bool) -> bool:
        """Whether the episode is over; what the environment said last is recorded without tokens."""
        rollout = self.rollout
        rollout.terminated = step.terminated
        cut = self.rollout.segments[-1][-1].finish_reason == "length"
        if not (step.terminated or step.truncated or last):
            return False
        rollout.truncated = step.truncated or cut or (last and not step.terminated)
        rollout.segments[-1].extend(_unsampled(step.messages, []))
        return True

    def _continue_with(self, new: Sequence[Message]) -> bool:
        """Append the environment's answer; False if the context is full."""
        if not new:
            raise EnvironmentFailure(
                "The environment's step returned no messages and did not end the episode. "
                "Return messages for the policy to answer, or terminated=True."
            )
        extension = self.chat.extend(self._messages, self._token_ids, new)
        length = len(extension.token_ids) + (0 if extension.forked else len(self._token_ids))
        self._messages.extend(new)
        if length >= self.settings.max_sequence_length:
            self.rollout.truncated = True
            self.rollout.segments[-1].extend(_unsampled(new, []))
            return False
        if extension.forked:
            self._token_ids = extension.token_ids
            self.rollout.segments.append(_unsampled(self._messages, extension.token_ids))
        else:
            self._token_ids = self._token_ids + extension.token_ids
            self.rollout.segments[-1].extend(_unsampled(new, extension.token_ids))
        return True

    # -- calls into the environment -----------------------------------------------------------------

    async def _call(
        self, stage: _Stage, method: Callable[[Unpack[_Ts]], object], *args: *_Ts, limit_s: float | None = None
    ) -> object:
        """Call a method of the environment, sync or async, under the environment's deadline or another."""
        self._stage = stage
        started = self._now()
        try:
            with PluginCall("environments", getattr(method, "__self__", self.settings.environment), stage):
                result = method(*args)
                if _is_awaitable(result):
                    result = await self._in_time(stage, result, limit_s)
                return result
        finally:
            self._environment_s += self._now() - started

    async def _in_time(self, stage: _Stage, waiting: Awaitable[_T], limit_s: float | None) -> _T:
        limit = limit_s or self.config.environment_timeout_s
        try:
            return await self._deadline.wait(waiting, limit)
        except TimeoutError as error:
            if error.args or isinstance(error, NemoRLError):
                raise  # the environment's own
            raise DeadlineExceeded(
                f"environment {stage} of {self.name} passed its deadline of {limit:g} s "
                f"({_DEADLINE_OF_TURNS if limit_s else 'rollouts.environment_timeout_s'})."
            ) from error

    async def _close(self, environment: Environment) -> None:
        """Close the environment; an earlier failure stays the one that is recorded."""
        stage = self._stage
        try:
            with contained("environments", environment, "close"):
                await self._call("close", environment.close)
        except Exception as error:
            if self.rollout.error is None:
                self._fail(error)
            else:
                _log.warning("closing the environment of %s failed as well: %s", self.name, error)
        self._stage = stage

    def _fail(self, error: Exception) -> None:
        stage: _Stage = "score" if isinstance(error, RewardError) else self._stage
        if isinstance(error, EnvironmentFailure | RewardError):  # what the core found wrong with an answer
            blame(error, provider_of("environments", self.settings.environment), stage)
        origin = origin_of(error)
        message = str(error).removeprefix(f"{origin}: ") or type(error).__name__
        if not isinstance(error, NemoRLError):
            message += _where(error)
        self.rollout.error = RolloutError(stage=stage, type=type(error).__name__, message=message, origin=origin)
        self.rollout.rewards = {}
        _log.debug("%s failed in %s: %s: %s", self.name, stage, type(error).__name__, message)


def _is_awaitable(found: object) -> TypeGuard[Awaitable[object]]:
    return hasattr(found, "__await__")


def _checked_prompt(found: object, method: Callable[..., object]) -> list[Message]:
    if isinstance(found, Sequence) and all(isinstance(message, Mapping) for message in found):
        return list(found)
    raise EnvironmentFailure(
        f"{method.__qualname__} returned {type(found).__name__}; it must return messages, such as "
        '[{"role": "user", "content": "..."}].'
    )


def _checked_step(found: object, method: Callable[..., object]) -> EnvironmentStep:
    if isinstance(found, EnvironmentStep):
        return found
    raise EnvironmentFailure(
        f"{method.__qualname__} returned {type(found).__name__}; it must return an EnvironmentStep."
    )


def _where(error: Exception) -> str:
    """File and line where an unexpected error was raised."""
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    return f" ({Path(frames[0].filename).name}:{frames[0].lineno} in {frames[0].name})" if frames else ""


def _unsampled(messages: Sequence[Message], token_ids: list[int]) -> list[Turn]:
    """A turn per message; the tokens of them all stand on the last."""
    turns = [Turn(message=message, token_ids=[], sampled=False) for message in messages]
    if turns:
        turns[-1].token_ids = token_ids
    return turns


def _for_turn(sampling: SamplingParams, room: int, seed: int) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=min(sampling.max_new_tokens, room),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        seed=seed,
    )
