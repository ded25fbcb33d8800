"""The contract of an environment.

Episodes are played four times over: by calling the environment, at the same time as others, through the real rollout
engine with a scripted policy, so that what the trainer would get is looked at as well, and in processes of their own,
where what an episode leaves behind can be told.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from nemo_rl_core.errors import NemoRLError
from nemo_rl_core.records.jsonl import read_groups, write_groups
from nemo_rl_core.records.rollout import RolloutGroup
from nemo_rl_core.records.to_batch import batch_from_groups
from nemo_rl_core.registry import ComponentRef
from nemo_rl_core.rollouts.context import EpisodeContext
from nemo_rl_core.rollouts.scoring.process_pool import ProcessPool
from nemo_rl_core.testing.conformance.cases.environment_bench import requests_of, same_json
from nemo_rl_core.testing.conformance.cases.environment_case import EnvironmentCase
from nemo_rl_core.testing.conformance.cases.environment_play import (
    PlayedEpisode,
    close,
    message_mistake,
    play,
    value_of,
)
from nemo_rl_core.testing.conformance.cases.environment_traces import EnvironmentTraces
from nemo_rl_core.testing.conformance.cases.malformed_turns import malformed
from nemo_rl_core.testing.conformance.frame.declared import overlaid
from nemo_rl_core.testing.conformance.frame.subject import structured
from nemo_rl_core.testing.conformance.reward import ODD_RESPONSES
from nemo_rl_core.testing.scripted_generation import ScriptedGeneration

__all__ = ["EnvironmentContract"]

_AT_A_TIME = 16
"""Episodes; a sandbox of each is small."""


class EnvironmentContract(EnvironmentTraces):
    """What every environment must be. Define the fixture `environment`, an `EnvironmentCase`.

    Attributes:
        step_timeout_s: Deadline of one step.
        max_block_s: Seconds for which a step may keep the event loop from the other episodes.
        shared_state: Names, as a report has them, that may change with each episode, such as `GameEnv.num_played`.
    """

    @classmethod
    def from_component(
        cls, ref: ComponentRef, options: Mapping[str, Any], example: Mapping[str, Any]
    ) -> EnvironmentCase:
        """Return the case that the component describes in its `example`, which has keywords of `EnvironmentCase`.

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
    def declared_by(cls, subject: object) -> object:
        """Return the environment of the case."""
        return subject.environment if isinstance(subject, EnvironmentCase) else subject

    @classmethod
    def mistake_in(cls, subject: object) -> str | None:
        """Refuse an environment: the fixture must return an `EnvironmentCase`."""
        if isinstance(subject, EnvironmentCase):
            return None
        found = getattr(subject, "__name__", type(subject).__name__)
        return f"it returns {found}: return EnvironmentCase(environment={found}, task={{...}}, response=...)"

    # -- clauses: the conversation ---------------------------------------------------------------

    def test_reset_gives_a_prompt(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """`reset` returns the messages of the prompt, each with a role and text, the last one not the policy's."""
        prompt = self._play(environment, _context, ()).prompt
        assert prompt, "it returned no messages"
        for message in prompt:
            mistake = message_mistake(message)
            assert mistake is None, mistake
        assert prompt[-1]["role"] != "assistant", "the last message of the prompt is the policy's"

    def test_step_gives_an_answer(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """`step` returns an `EnvironmentStep`: rewards are finite Python numbers with names, messages have text."""
        for turns in (environment.turns, environment.wrong_turns, [""] * environment.turn_limit):
            self._sound_answers(self._play(environment, _context, turns))

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
        """A step that does not end the episode says something new that the policy can answer, in its own name."""
        for turns in (environment.turns, [environment.wrong_response] * environment.turn_limit):
            played = self._play(environment, _context, turns)
            for number, step in enumerate(played.steps):
                roles = [message.get("role") for message in step.messages]
                assert "assistant" not in roles, (
                    f"step {number} says {roles}: the policy's turn is there already, only what follows it is returned"
                )
                said = list(step.messages)
                repeats = len(said) >= len(played.prompt) and said[: len(played.prompt)] == played.prompt
                assert not repeats, f"step {number} says the prompt again: only what follows the turn is returned"
                if not (step.terminated or step.truncated):
                    assert step.messages, f"step {number} neither ends the episode nor says anything"

    def test_answers_stay_as_given(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """What it returned it does not change later: prompt, messages, rewards and info are new for each step."""
        for turns in (environment.turns, environment.wrong_turns):
            for what, now, then in self._play(environment, _context, turns).returned:
                assert now == then, f"{what} was {then!r:.100} when it was returned, and is {now!r:.100}"

    def test_bad_tasks_are_errors(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """A row that it cannot play is an error of that episode, never a reward."""
        if not environment.bad_tasks:
            pytest.skip("no `bad_tasks` are given")
        for task in environment.bad_tasks:
            try:
                played = self._play(environment, _context, environment.turns, task=task)
            except Exception:
                continue
            raise AssertionError(f"the row {task!r:.80} got {played.totals} in place of an error")

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
        self._answers(environment, _context, [((response,), response) for response in ODD_RESPONSES])

    def test_malformed_turns(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """It answers turns that are nearly those of the example: cut, nested, unknown names, values of other types."""
        names = set(self._play(environment, _context, environment.turns).totals)
        good, limit = environment.turns, environment.turn_limit
        plans = [
            ((*good[:position], response, *good[position:])[:limit], response)
            for position, turn in enumerate(good)
            for response in malformed(turn)
        ]
        for (_, response), played in zip(plans, self._answers(environment, _context, plans), strict=True):
            found = set(played.totals)
            same = found == names or not played.ended
            assert same, f"after the turn {response[:60]!r} the rewards are {sorted(found)}, not {sorted(names)}"

    def _answers(
        self, environment: EnvironmentCase, context: EpisodeContext, plans: Sequence[tuple[Sequence[str], str]]
    ) -> list[PlayedEpisode]:
        """Play turns of which one is odd, some episodes at a time; an error or an unsound answer names it."""
        places = asyncio.Semaphore(_AT_A_TIME)

        async def answer(turns: Sequence[str], response: str) -> PlayedEpisode:
            said = f"the response {response[:60]!r} ({len(response)} characters)"
            try:
                async with places:
                    played = await play(environment, context, turns)
                self._sound_answers(played)
            except AssertionError as error:
                raise AssertionError(f"after {said}: {error}") from error
            except Exception as error:
                raise AssertionError(f"{said} raised {type(error).__name__}: {error}") from error
            return played

        async def answers() -> list[PlayedEpisode]:
            return list(await asyncio.gather(*(answer(*plan) for plan in plans)))

        return asyncio.run(answers())

    # -- clauses: closing --------------------------------------------------------------------------------

    def test_close_twice(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """`close` may be called again."""
        asyncio.run(self._closed(environment, _context, environment.turns, times=3))

    def test_close_at_any_time(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """`close` works before `reset`, in the middle of an episode, and after a failed step."""
        asyncio.run(self._closed(environment, _context, None))
        asyncio.run(self._closed(environment, _context, ()))

        async def after_an_error() -> None:
            made = environment.make(_context)
            await value_of(made.reset(environment.task, 3))
            broken: Any = {"role": "assistant", "content": 17}
            with contextlib.suppress(Exception):  # it may refuse what no engine would send
                await value_of(made.step(broken))
            await close(made, "after a step that failed")

        asyncio.run(after_an_error())

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
            asked = [request.prompt_ids for request in requests_of(generation, rollout)]
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
            sampled = [generation.sampled[r.request_id] for r in requests_of(generation, rollout)]
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
            assert same_json(after.info, before.info), f"info {before.info!r:.120} was read back as {after.info!r:.120}"
