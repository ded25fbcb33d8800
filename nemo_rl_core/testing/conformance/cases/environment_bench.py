"""What the contract of an environment runs on: episodes played alone, at the same time, and through the engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import ClassVar

import pytest
from attrs import evolve

from nemo_rl_core.data.message_log import ChatFormatter
from nemo_rl_core.errors import RewardError
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.models.tokenizer import Tokenizer
from nemo_rl_core.protocols.generation_backend import GenerationRequest, SamplingParams
from nemo_rl_core.records.completion import Completion
from nemo_rl_core.records.message import Task
from nemo_rl_core.records.rewards import finite_rewards
from nemo_rl_core.records.rollout import Rollout, RolloutGroup
from nemo_rl_core.rollouts.context import EpisodeContext
from nemo_rl_core.rollouts.engine import RolloutEngine
from nemo_rl_core.rollouts.scoring.process_pool import ProcessPool
from nemo_rl_core.schema import RolloutConfig
from nemo_rl_core.testing.conformance.cases.environment_case import EnvironmentCase
from nemo_rl_core.testing.conformance.cases.environment_play import (
    PlayedEpisode,
    begin,
    close,
    message_mistake,
    plain_reward_mistake,
    play,
    take_turn,
    value_of,
)
from nemo_rl_core.testing.conformance.frame._pool import shared_pool
from nemo_rl_core.testing.conformance.frame.kit import Contract
from nemo_rl_core.testing.scripted_generation import ScriptedGeneration

__all__ = ["EnvironmentBench", "RecordingPolicy", "requests_of", "same_json"]


class EnvironmentBench(Contract):
    """Plays episodes; base of the contract of an environment.

    Attributes:
        step_timeout_s: Deadline of one step.
    """

    kind: ClassVar[str] = "environments"
    subject: ClassVar[str] = "environment"
    step_timeout_s: ClassVar[float] = 20.0

    @pytest.fixture
    def _pool(self) -> ProcessPool:
        return shared_pool()

    @pytest.fixture
    def _context(self, _pool: ProcessPool) -> EpisodeContext:
        return EpisodeContext(_pool, reward_timeout_s=self.step_timeout_s)

    def _play(
        self,
        case: EnvironmentCase,
        context: EpisodeContext,
        turns: Sequence[str],
        *,
        seed: int = 3,
        task: Task | None = None,
    ) -> PlayedEpisode:
        """Play one episode alone, until it ends or nothing is left to say."""
        return asyncio.run(play(case, context, turns, seed=seed, task=task))

    def _play_together(
        self, case: EnvironmentCase, context: EpisodeContext, plans: Sequence[tuple[Sequence[str], int]]
    ) -> list[object]:
        """Play episodes turn by turn at the same time, each with its seed; one that has ended is closed at once.

        One more begins with them and is given up after its first turn.
        """

        async def together() -> list[object]:
            made = [case.make(context) for _ in plans]
            given_up = case.make(context)
            episodes = [await begin(e, case.task, seed) for e, (_, seed) in zip(made, plans, strict=True)]
            await take_turn(given_up, case.turns, await begin(given_up, case.task, 99), 0)
            await value_of(given_up.close())
            closed: set[int] = set()
            for turn in range(max(len(turns) for turns, _ in plans)):
                for number, (turns, _) in enumerate(plans):
                    await take_turn(made[number], turns, episodes[number], turn)
                    if episodes[number].ended and number not in closed:
                        closed.add(number)
                        await value_of(made[number].close())
            for number in set(range(len(plans))) - closed:
                await value_of(made[number].close())
            return [episode.plain() for episode in episodes]

        return asyncio.run(together())

    async def _closed(
        self, case: EnvironmentCase, context: EpisodeContext, turns: Sequence[str] | None, *, times: int = 1
    ) -> None:
        """Play `turns` (None: not even `reset`), then close so many times."""
        made = case.make(context)
        if turns is not None:
            episode = await begin(made, case.task, 3)
            for turn in range(len(turns)):
                await take_turn(made, turns, episode, turn)
        for time in range(times):
            await close(made, f"for the {time + 1}. time" if turns is not None else "before reset")

    def _sound_answers(self, episode: PlayedEpisode) -> None:
        """Every step of an episode has rewards and messages as they must be."""
        for number, step in enumerate(episode.steps):
            mistake = plain_reward_mistake(step.rewards)
            assert mistake is None, f"in step {number} {mistake}"
            try:
                finite_rewards(step.rewards)
            except RewardError as error:
                raise AssertionError(f"in step {number} {error}") from error
            for message in step.messages:
                mistake = message_mistake(message)
                assert mistake is None, f"in step {number} {mistake}"

    def _rollouts(self, case: EnvironmentCase, pool: ProcessPool) -> tuple[RolloutGroup, RecordingPolicy]:
        """A group of three through the real engine, the policy saying the good episode."""
        tokenizer = load_tokenizer("scratch:qwen2-tiny")
        generation = RecordingPolicy(case.turns, tokenizer)
        engine = RolloutEngine(
            generation=generation,
            environment=case.make,
            chat=ChatFormatter(tokenizer),
            config=RolloutConfig(
                max_turns=case.turn_limit,
                environment_timeout_s=self.step_timeout_s,
                reward_timeout_s=self.step_timeout_s,
            ),
            sampling=SamplingParams(max_new_tokens=max(map(len, case.turns)) * 4 + 8),
            pool=pool,
            seed=3,
            max_sequence_length=1 << 20,
        )
        run = engine.run_group(0, "t", case.task, group_size=3, weight_version=0)
        return asyncio.run(run), generation


class RecordingPolicy(ScriptedGeneration):
    """Says one turn after the other and remembers the tokens, in a copy that nobody else holds."""

    def __init__(self, turns: Sequence[str], tokenizer: Tokenizer) -> None:
        self._turns = turns
        super().__init__(self._say, tokenizer)
        self.sampled: dict[str, tuple[int, ...]] = {}

    def _say(self, request: GenerationRequest) -> str:
        return self._turns[min(request.order[-1], len(self._turns) - 1)]

    async def generate(self, request: GenerationRequest) -> Completion:
        """As scripted, remembered; the text is the turn's own, also where the tokenizer lacks a character."""
        completion = await super().generate(request)
        self.sampled[request.request_id] = tuple(completion.token_ids)
        return evolve(completion, text=self._say(request))


def requests_of(generation: ScriptedGeneration, rollout: Rollout) -> list[GenerationRequest]:
    """What was asked of the policy in a rollout, in order."""
    own = [r for r in generation.requests if r.order[1] == rollout.index]
    return sorted(own, key=lambda request: request.order)


def same_json(found: object, expected: object) -> bool:
    """Whether two values are the same in JSON; what JSON does not have counts as different."""
    try:
        return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)
    except TypeError:
        return False
