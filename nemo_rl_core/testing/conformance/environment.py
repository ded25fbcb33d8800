"""The contract of an environment.

Episodes are played twice over: by calling the environment, and through the real rollout engine with a scripted
policy, so that what the trainer would get is looked at as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import itertools
import json
import random
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from attrs import define, evolve, field

from nemo_rl_core.data.message_log import ChatFormatter
from nemo_rl_core.errors import NemoRLError, RewardError
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.protocols.environment import Environment, EnvironmentStep
from nemo_rl_core.protocols.generation_backend import GenerationRequest, SamplingParams
from nemo_rl_core.records.completion import Completion
from nemo_rl_core.records.jsonl import read_groups, write_groups
from nemo_rl_core.records.message import Message, Task
from nemo_rl_core.records.rewards import finite_rewards
from nemo_rl_core.records.rollout import Rollout, RolloutGroup
from nemo_rl_core.records.to_batch import batch_from_groups
from nemo_rl_core.registry import ComponentRef
from nemo_rl_core.rollouts.context import EpisodeContext
from nemo_rl_core.rollouts.engine import RolloutEngine
from nemo_rl_core.rollouts.scoring.process_pool import ProcessPool
from nemo_rl_core.schema import RolloutConfig
from nemo_rl_core.testing.conformance.cases.environment_case import EnvironmentCase
from nemo_rl_core.testing.conformance.frame._blocking import longest_block
from nemo_rl_core.testing.conformance.frame._pool import shared_pool
from nemo_rl_core.testing.conformance.frame.declared import overlaid
from nemo_rl_core.testing.conformance.frame.kit import Contract
from nemo_rl_core.testing.conformance.frame.subject import structured
from nemo_rl_core.testing.conformance.reward import ODD_RESPONSES
from nemo_rl_core.testing.scripted_generation import ScriptedGeneration

__all__ = ["EnvironmentContract"]

_ROLES = ("system", "user", "assistant", "tool")


@define
class _Episode:
    """What was played."""

    prompt: list[Any]
    steps: list[EnvironmentStep] = field(factory=list)
    said: list[tuple[Any, Any]] = field(factory=list)
    """Every message of prompt, policy and environment, and a copy of it as it was when it was said."""

    def hear(self, messages: Sequence[Any]) -> None:
        """Remember messages as they are now."""
        self.said += [(message, copy.deepcopy(message)) for message in messages]

    @property
    def totals(self) -> dict[str, float]:
        """Rewards by name, summed over the steps."""
        totals: dict[str, float] = {}
        for step in self.steps:
            for name, value in step.rewards.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def plain(self) -> Any:
        """To be compared: prompt, answers, rewards and ends."""
        steps = [(list(s.messages), dict(s.rewards), s.terminated, s.truncated) for s in self.steps]
        return copy.deepcopy((self.prompt, steps))


class EnvironmentContract(Contract):
    """What every environment must be. Define the fixture `environment`, an `EnvironmentCase`.

    Attributes:
        step_timeout_s: Deadline of one step.
        max_block_s: Seconds for which a step may keep the event loop from the other episodes.
    """

    kind: ClassVar[str] = "environments"
    subject: ClassVar[str] = "environment"
    step_timeout_s: ClassVar[float] = 20.0
    max_block_s: ClassVar[float] = 2.0

    @classmethod
    def from_component(
        cls, ref: ComponentRef, options: Mapping[str, Any], example: Mapping[str, Any]
    ) -> EnvironmentCase:
        """The case that the component gives as its `example`: keywords of `EnvironmentCase`.

        Raises:
            NemoRLError: It gives none, so there is nothing to play; or it has no steps.
        """
        from nemo_rl_core.protocols.environment import DrivingEnvironment

        component = ref.load()
        if isinstance(component, type) and issubclass(component, DrivingEnvironment):
            raise NemoRLError(f"The environment {ref.name!r} asks the policy itself: test it with a RolloutEngine.")
        if "task" not in example:
            raise NemoRLError(
                f"The environment {ref.name!r} cannot be checked by its name alone: it does not say what to play. Give "
                'its class an attribute such as example = {"task": {"prompt": "2 + 2?"}, "response": "4"}, or '
                "sub-class EnvironmentContract in a test."
            )
        config = overlaid(example.get("config") or {}, options)
        structured(cls.kind, ref, config)  # its mistakes in words
        return EnvironmentCase(**{"environment": ref.load(), **example, "config": config})

    @classmethod
    def declared_by(cls, subject: Any) -> Any:
        """The environment of the case."""
        return subject.environment

    @classmethod
    def mistake_in(cls, subject: Any) -> str | None:
        """The fixture gives a case, not an environment."""
        if isinstance(subject, EnvironmentCase):
            return None
        found = getattr(subject, "__name__", type(subject).__name__)
        return f"it returns {found}: return EnvironmentCase(environment={found}, task={{...}}, response=...)"

    @pytest.fixture
    def _pool(self) -> ProcessPool:
        return shared_pool()

    @pytest.fixture
    def _context(self, _pool: ProcessPool) -> EpisodeContext:
        return EpisodeContext(_pool, reward_timeout_s=self.step_timeout_s)

    # -- clauses: the conversation ---------------------------------------------------------------

    def test_reset_gives_a_prompt(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """`reset` returns the messages of the prompt, each with a role and text, the last one not the policy's."""
        prompt = self._play(environment, _context, ()).prompt
        assert prompt, "it returned no messages"
        for message in prompt:
            assert isinstance(message, Mapping), f"a message is a {type(message).__name__}, not a mapping"
            assert message.get("role") in _ROLES, f"role {message.get('role')!r} is none of {', '.join(_ROLES)}"
            assert isinstance(message.get("content"), str), f"content is {message.get('content')!r:.60}, not text"
        assert prompt[-1]["role"] != "assistant", "the last message of the prompt is the policy's"

    def test_step_gives_an_answer(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """`step` returns an `EnvironmentStep` whose rewards are finite numbers with names."""
        for step in self._play(environment, _context, environment.turns).steps:
            unnamed = [name for name in step.rewards if not isinstance(name, str)]
            assert not unnamed, f"a reward is named {unnamed[0]!r}, which is no text"
            try:
                finite_rewards(step.rewards)
            except RewardError as error:
                raise AssertionError(str(error)) from error

    def test_ends_within_the_turn_limit(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """The episode ends by itself within its turn limit, whatever the policy says."""
        limit = environment.turn_limit
        for turns in (environment.turns, [environment.wrong_response] * limit, [""] * limit):
            played = self._play(environment, _context, turns)
            ended = bool(played.steps) and (played.steps[-1].terminated or played.steps[-1].truncated)
            assert ended, f"after {len(played.steps)} turns of {turns[0]!r:.40} it has not ended"

    def test_tells_ends_apart(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """An episode that ended by its rules is `terminated`, one that was cut off `truncated`; no step is both."""
        limit = environment.turn_limit
        for turns in (environment.turns, [environment.wrong_response] * limit):
            for step in self._play(environment, _context, turns).steps:
                assert not (step.terminated and step.truncated), "a step is terminated and truncated at once"
        last = self._play(environment, _context, environment.turns).steps[-1]
        assert last.terminated, "the good episode does not end as terminated"

    def test_goes_on_with_messages(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """A step that does not end the episode says something that the policy can answer."""
        for turns in (environment.turns, [environment.wrong_response] * environment.turn_limit):
            for number, step in enumerate(self._play(environment, _context, turns).steps):
                if step.terminated or step.truncated:
                    continue
                assert step.messages, f"step {number} neither ends the episode nor says anything"
                roles = [message.get("role") for message in step.messages]
                assert all(r in _ROLES for r in roles) and roles[-1] != "assistant", f"step {number} says {roles}"

    # -- clauses: rewards --------------------------------------------------------------------------

    def test_good_is_better(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """The good response earns more than the wrong one."""
        good = sum(self._play(environment, _context, environment.turns).totals.values())
        wrong_turns = (*environment.turns_before, environment.wrong_response)
        wrong = sum(self._play(environment, _context, wrong_turns).totals.values())
        assert good > wrong, (
            f"{environment.response!r:.40} earns {good:g}, {environment.wrong_response!r:.40} {wrong:g}"
        )

    def test_reward_names_are_stable(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """An episode has the same rewards by name whatever the policy says, so that a metric means one thing."""
        names = sorted(self._play(environment, _context, environment.turns).totals)
        assert names, "no step has a reward"
        for said in (environment.wrong_response, ""):
            turns = (*environment.turns_before, *[said] * environment.turn_limit)
            found = sorted(self._play(environment, _context, turns).totals)
            assert found == names, f"for {said!r:.40} the rewards are {found}, for the good episode {names}"

    def test_any_response(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """It answers whatever a policy may say: nothing, other scripts, half an answer, very much."""
        for response in ODD_RESPONSES:
            try:
                for step in self._play(environment, _context, [response]).steps:
                    finite_rewards(step.rewards)
            except Exception as error:
                said = f"the response {response[:40]!r} ({len(response)} characters)"
                raise AssertionError(f"{said} raised {type(error).__name__}: {error}") from error

    # -- clauses: an episode on its own ------------------------------------------------------------

    def test_seedable(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """Equal task and seed give an equal episode, whatever was drawn from global random numbers before."""
        if not environment.deterministic:
            pytest.skip("declared to be drawn (deterministic = False)")
        first = self._play(environment, _context, environment.turns, seed=5).plain()
        random.seed(99)
        for _ in range(2):
            again = self._play(environment, _context, environment.turns, seed=5).plain()
            assert again == first, f"with seed 5 it gave {again!r:.200} after {first!r:.200}"

    def test_instances_are_independent(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """Episodes that run at the same time do not disturb each other."""
        wrong = (*environment.turns_before, environment.wrong_response)
        plans = [environment.turns, wrong] * 3
        alone = [self._play(environment, _context, plan).plain() for plan in plans]

        async def together() -> list[Any]:
            made = [environment.make(_context) for _ in plans]
            played = [_Episode(list(await _value(e.reset(environment.task, 3)))) for e in made]
            for turn in range(max(map(len, plans))):
                for e, plan, episode in zip(made, plans, played, strict=True):
                    await _take_turn(e, plan, episode, turn)
            for e in made:
                await _value(e.close())
            return [episode.plain() for episode in played]

        for number, (found, expected) in enumerate(zip(asyncio.run(together()), alone, strict=True)):
            assert found == expected, f"among others episode {number} gave {found!r:.200}, alone {expected!r:.200}"

    def test_task_is_left_alone(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """It does not change the task, which the other rollouts of the group share."""
        task = copy.deepcopy(dict(environment.task))
        before = copy.deepcopy(task)
        self._play(environment, _context, environment.turns, task=task)
        assert task == before, f"the task was {before!r:.120} and is {task!r:.120}"

    def test_close_twice(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """`close` may be called again."""
        asyncio.run(self._closed(environment, _context, environment.turns, times=3))

    def test_close_at_any_time(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """`close` works before `reset`, in the middle of an episode, and after a failed step."""
        asyncio.run(self._closed(environment, _context, None))
        asyncio.run(self._closed(environment, _context, ()))

        async def after_an_error() -> None:
            made = environment.make(_context)
            await _value(made.reset(environment.task, 3))
            broken: Any = {"role": "assistant", "content": 17}
            with contextlib.suppress(Exception):  # it may refuse what no engine would send
                await _value(made.step(broken))
            await _close(made, "after a step that failed")

        asyncio.run(after_an_error())

    def test_event_loop_goes_on(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """It does not block the event loop on which all other episodes run."""
        asyncio.run(self._played(environment, _context, environment.turns))  # imports
        blocked = asyncio.run(longest_block(self._played(environment, _context, environment.turns)))
        assert blocked <= self.max_block_s, (
            f"it blocked the event loop for {blocked:.1f} s: make it async, or use context.run_in_pool"
        )

    # -- clauses: through the rollout engine ---------------------------------------------------------

    def test_plays_in_the_engine(self, environment: EnvironmentCase, _pool: ProcessPool) -> None:
        """Through the rollout engine no rollout of a group fails, and each ends with its reward."""
        group, _ = self._rollouts(environment, _pool)
        for rollout in group.rollouts:
            assert rollout.error is None, f"rollout {rollout.index} failed in {rollout.error}"
            assert rollout.rewards, f"rollout {rollout.index} has no reward"
            assert rollout.terminated and not rollout.truncated, f"rollout {rollout.index} was cut off"

    def test_prefix_is_kept(self, environment: EnvironmentCase, _pool: ProcessPool) -> None:
        """Each turn continues what was said before it: no message that was said is changed, no token is replaced."""
        played = self._play(environment, EpisodeContext(_pool, reward_timeout_s=self.step_timeout_s), environment.turns)
        for number, (message, as_said) in enumerate(played.said):
            assert message == as_said, (
                f"message {number} was {as_said!r:.100} when it was said, and is {message!r:.100}"
            )
        group, generation = self._rollouts(environment, _pool)
        for rollout in group.rollouts:
            assert rollout.error is None, f"rollout {rollout.index} failed in {rollout.error}"
            assert len(rollout.segments) == 1, (
                f"rollout {rollout.index} was forked into {len(rollout.segments)} sequences: its history was rewritten"
            )
            asked = [request.prompt_ids for request in _requests(generation, rollout)]
            for earlier, later in itertools.pairwise(asked):
                assert list(later[: len(earlier)]) == list(earlier), (
                    "a later prompt does not begin with the earlier one"
                )

    def test_token_in_token_out(self, environment: EnvironmentCase, _pool: ProcessPool) -> None:
        """The training batch holds exactly the sampled tokens as trained ones, with their logprobs."""
        group, generation = self._rollouts(environment, _pool)
        for rollout in group.rollouts:
            assert rollout.error is None, f"rollout {rollout.index} failed in {rollout.error}"
            batch = batch_from_groups([RolloutGroup(group_id=0, task_id="t", rollouts=[rollout])])
            mask = batch["loss_mask"]
            sampled = [generation.sampled[r.request_id] for r in _requests(generation, rollout)]
            tokens = [token for completion in sampled for token in completion]
            trained = batch["input_ids"][mask].tolist()
            assert trained == tokens, f"sampled were {len(tokens)} tokens, trained are {len(trained)} others"
            logprobs = [ScriptedGeneration.logprob(t, i) for completion in sampled for i, t in enumerate(completion)]
            found = batch["rollout_logprobs"][mask].tolist()
            assert found == pytest.approx(logprobs, abs=1e-6), "the logprobs are not those of the sampled tokens"

    def test_record_reads_back(self, environment: EnvironmentCase, _pool: ProcessPool, tmp_path: Path) -> None:
        """What it leaves in a rollout (rewards, `info`) survives the record on disk."""
        group, _ = self._rollouts(environment, _pool)
        path = tmp_path / "rollouts.jsonl"
        try:
            write_groups(path, [group])
        except Exception as error:
            raise AssertionError(f"the rollouts cannot be recorded: {type(error).__name__}: {error}") from error
        (again,) = read_groups(path)
        for before, after in zip(group.rollouts, again.rollouts, strict=True):
            assert after.rewards == before.rewards, f"rewards {before.rewards} were read back as {after.rewards}"
            assert _same_json(after.info, before.info), (
                f"info {before.info!r:.120} was read back as {after.info!r:.120}"
            )

    # -- playing -------------------------------------------------------------------------------------

    def _play(
        self,
        case: EnvironmentCase,
        context: EpisodeContext,
        turns: Sequence[str],
        *,
        seed: int = 3,
        task: Task | None = None,
    ) -> _Episode:
        """Play one episode alone, until it ends or nothing is left to say."""
        return asyncio.run(self._played(case, context, turns, seed=seed, task=task))

    async def _played(
        self,
        case: EnvironmentCase,
        context: EpisodeContext,
        turns: Sequence[str],
        *,
        seed: int = 3,
        task: Task | None = None,
    ) -> _Episode:
        made = case.make(context)
        try:
            episode = _Episode(list(await _value(made.reset(case.task if task is None else task, seed))))
            episode.hear(episode.prompt)
            for turn in range(len(turns)):
                await _take_turn(made, turns, episode, turn)
            return episode
        finally:
            await _value(made.close())

    async def _closed(
        self, case: EnvironmentCase, context: EpisodeContext, turns: Sequence[str] | None, *, times: int = 1
    ) -> None:
        """Play `turns` (None: not even `reset`), then close so many times."""
        made = case.make(context)
        if turns is not None:
            episode = _Episode(list(await _value(made.reset(case.task, 3))))
            for turn in range(len(turns)):
                await _take_turn(made, turns, episode, turn)
        for time in range(times):
            await _close(made, f"for the {time + 1}. time" if turns is not None else "before reset")

    def _rollouts(self, case: EnvironmentCase, pool: ProcessPool) -> tuple[RolloutGroup, _Recording]:
        """A group of three through the real engine, the policy saying the good episode."""
        tokenizer = load_tokenizer("scratch:qwen2-tiny")
        generation = _Recording(case.turns, tokenizer)
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


class _Recording(ScriptedGeneration):
    """Says one turn after the other and remembers the tokens, in a copy that nobody else holds."""

    def __init__(self, turns: Sequence[str], tokenizer: Any) -> None:
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


def _requests(generation: ScriptedGeneration, rollout: Rollout) -> list[GenerationRequest]:
    own = [r for r in generation.requests if r.order[1] == rollout.index]
    return sorted(own, key=lambda request: request.order)


async def _take_turn(made: Environment, turns: Sequence[str], episode: _Episode, turn: int) -> None:
    """Say a turn, if the episode still goes on."""
    ended = episode.steps and (episode.steps[-1].terminated or episode.steps[-1].truncated)
    if turn < len(turns) and not ended:
        message: Message = {"role": "assistant", "content": turns[turn]}
        episode.hear([message])
        step = await _value(made.step(message))
        assert isinstance(step, EnvironmentStep), f"step returned {type(step).__name__}, not an EnvironmentStep"
        episode.steps.append(step)
        episode.hear(step.messages)


async def _close(made: Environment, when: str) -> None:
    try:
        await _value(made.close())
    except Exception as error:
        raise AssertionError(f"closing it {when} raised {type(error).__name__}: {error}") from error


async def _value(result: Awaitable[Any] | Any) -> Any:
    return await result if inspect.isawaitable(result) else result


def _same_json(found: Any, expected: Any) -> bool:
    """Whether two values are the same in JSON; what JSON does not have counts as different."""
    try:
        return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)
    except TypeError:
        return False
