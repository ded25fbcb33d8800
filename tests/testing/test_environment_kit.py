"""The contract of an environment against environments broken on purpose, one at least for each clause."""

from __future__ import annotations

import copy
import functools
import random
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest

from nemo_rl_core.protocols.environment import EnvironmentStep, SingleTurnEnvironment
from nemo_rl_core.testing import EnvironmentCase, EnvironmentContract, run_kit
from nemo_rl_core.testing.conformance.frame.kit import clauses

sys.path.insert(0, str(Path(__file__).parent))
import environment_mistakes
from environment_mistakes import MISTAKES

TASK = {"prompt": "Guess a number from 1 to 9.", "number": 7, "notes": ["first guess: 5"]}


class Sound:
    """A number is guessed in three turns; after each wrong guess the policy hears whether it was too small."""

    config_class = dict
    limit = 3

    def __init__(self, config, context):
        self.context = context
        self.task = {}
        self.turn = 0
        self.sign = ""

    def reset(self, task, seed):
        self.task, self.turn = task, 0
        self.sign = random.Random(seed).choice(["!", "?"])
        return [{"role": "system", "content": "A game."}, {"role": "user", "content": task["prompt"] + self.sign}]

    async def step(self, message):
        self.turn += 1
        text = message["content"].strip()
        guess = int(text) if text.isdecimal() and len(text) < 5 else 0
        if guess == self.task["number"]:
            return self.ended(1.0, terminated=True)
        if self.turn == self.limit:
            return self.ended(0.0, truncated=True)
        return self.answer("too small" if guess < self.task["number"] else "too large")

    def answer(self, text):
        return EnvironmentStep(messages=[{"role": "user", "content": text + self.sign}])

    def ended(self, reward, **how):
        return EnvironmentStep(rewards={"found": reward}, info={"turns": self.turn, "sign": self.sign}, **how)

    def close(self):
        self.task = {}


class SoundOneTurn(SingleTurnEnvironment):
    async def score(self, task, response):
        return float(response.strip() == str(task["number"]))


def case(environment):
    return EnvironmentCase(
        environment=environment, task=TASK, turns_before=("5", "8"), response="7", wrong_response="9", max_turns=3
    )


# -- the conversation ---------------------------------------------------------------------------------------


class NoPrompt(Sound):
    def reset(self, task, seed):
        super().reset(task, seed)
        return []


class PromptOfThePolicy(Sound):
    def reset(self, task, seed):
        return [*super().reset(task, seed), {"role": "assistant", "content": "My guess:"}]


class PromptAsText(Sound):
    def reset(self, task, seed):
        return [message["content"] for message in super().reset(task, seed)]


class StepAsTuple(Sound):
    async def step(self, message):
        step = await super().step(message)
        return step.messages, step.rewards, step.terminated


class NanReward(Sound):
    def ended(self, reward, **how):
        return super().ended(reward / 0.5 if reward else float("nan"), **how)

    def answer(self, text):
        return EnvironmentStep(messages=super().answer(text).messages, rewards={"found": float("nan")})


class NeverEnds(Sound):
    limit = 1000


class BothEnds(Sound):
    def ended(self, reward, **how):
        return super().ended(reward, terminated=True, truncated=True)


class TruncatedOnly(Sound):
    def ended(self, reward, **how):
        return super().ended(reward, truncated=True)


class Speechless(Sound):
    def answer(self, text):
        return EnvironmentStep()


class SpeaksForThePolicy(Sound):
    def answer(self, text):
        return EnvironmentStep(messages=[{"role": "assistant", "content": text}])


# -- rewards ------------------------------------------------------------------------------------------------


class RewardsTheWrongOne(Sound):
    def ended(self, reward, **how):
        return super().ended(1.0 - reward, **how)


class NamedByOutcome(Sound):
    def ended(self, reward, **how):
        return EnvironmentStep(rewards={"found" if reward else "lost": reward}, **how)


class RaisesOnWords(Sound):
    async def step(self, message):
        int(message["content"])
        return await super().step(message)


# -- an episode on its own --------------------------------------------------------------------------------


class GlobalRandomNumbers(Sound):
    def reset(self, task, seed):
        prompt = super().reset(task, seed)
        self.sign = str(random.random())
        return [*prompt, {"role": "user", "content": self.sign}]


class SharedTurn(Sound):
    """The turn is counted in the class."""

    turns: ClassVar[dict] = {}

    async def step(self, message):
        self.turn = self.turns["all"] = self.turns.get("all", 0) + 1
        return await super().step(message)

    def reset(self, task, seed):
        self.turns.clear()
        return super().reset(task, seed)


class EditsTheTask(Sound):
    async def step(self, message):
        self.task["notes"].append(message["content"])
        return await super().step(message)


class ClosesOnce(Sound):
    def close(self):
        del self.task


class ClosesAfterReset(Sound):
    def __init__(self, config, context):
        super().__init__(config, context)
        self.handle = None

    def reset(self, task, seed):
        self.handle = [1]
        return super().reset(task, seed)

    async def close(self):
        self.handle.clear()


class CannotCloseAfterAnError(Sound):
    busy = False

    async def step(self, message):
        self.busy = True
        step = await super().step(message)
        self.busy = False
        return step

    def close(self):
        if self.busy:
            raise RuntimeError("a step is under way")


class Blocks(Sound):
    def reset(self, task, seed):
        time.sleep(0.06)
        return super().reset(task, seed)


# -- through the engine -----------------------------------------------------------------------------------


class LateAndSilent(Sound):
    """The last step of a long episode raises only where the engine's own message object comes in."""

    async def step(self, message):
        if self.turn == 2 and getattr(self.context, "completion_ids", None):
            raise KeyError("state")
        return await super().step(message)


class RewritesWhatWasSaid(Sound):
    async def step(self, message):
        step = await super().step(message)
        message["content"] = f"Guess {self.turn}: {message['content']}"
        return step


class RewritesThePrompt(Sound):
    def reset(self, task, seed):
        self.prompt = super().reset(task, seed)
        return self.prompt

    async def step(self, message):
        self.prompt[0]["content"] += " You have tried."
        return await super().step(message)


class EatsATokenOfTheCompletion(Sound):
    async def step(self, message):
        if self.context.completion_ids:
            self.context.completion_ids[0] += 1
        return await super().step(message)


class RecordsAnObject(Sound):
    def ended(self, reward, **how):
        step = super().ended(reward, **how)
        return EnvironmentStep(rewards=step.rewards, info={"state": self}, **how)


class RecordsItself(Sound):
    """Info that no record can hold: it contains itself."""

    def ended(self, reward, **how):
        info: dict = {}
        info["again"] = info
        return EnvironmentStep(rewards={"found": reward}, info=info, **how)


BROKEN = {
    "reset_gives_a_prompt": [NoPrompt, PromptOfThePolicy, PromptAsText],
    "step_gives_an_answer": [StepAsTuple, NanReward],
    "ends_within_the_turn_limit": [NeverEnds],
    "tells_ends_apart": [BothEnds, TruncatedOnly],
    "goes_on_with_messages": [Speechless, SpeaksForThePolicy],
    "good_is_better": [RewardsTheWrongOne],
    "reward_names_are_stable": [NamedByOutcome],
    "any_response": [RaisesOnWords],
    "seedable": [GlobalRandomNumbers],
    "instances_are_independent": [SharedTurn],
    "task_is_left_alone": [EditsTheTask],
    "close_twice": [ClosesOnce],
    "close_at_any_time": [ClosesAfterReset, CannotCloseAfterAnError],
    "event_loop_goes_on": [Blocks],
    "plays_in_the_engine": [LateAndSilent, Speechless],
    "prefix_is_kept": [RewritesWhatWasSaid, RewritesThePrompt],
    "token_in_token_out": [EatsATokenOfTheCompletion],
    "record_reads_back": [RecordsAnObject, RecordsItself],
}
BROKEN = {clause: [functools.partial(case, broken) for broken in many] for clause, many in BROKEN.items()}


def one_turn():
    return EnvironmentCase(environment=SoundOneTurn, task=TASK, response="7")


def tool_game(environment):
    """The game of `environment_mistakes`."""
    call = environment_mistakes.call
    return EnvironmentCase(
        environment=environment,
        task=copy.deepcopy(environment_mistakes.TASK),
        turns_before=(call(5), call(8)),
        response=call(7),
        wrong_response=call(9),
        max_turns=4,
        seeded=True,
        bad_tasks=({"prompt": "Guess."},),
    )


@pytest.mark.parametrize("make", [functools.partial(case, Sound), one_turn], ids=["several-turns", "one-turn"])
def test_a_sound_environment_passes_every_clause(make):
    report = run_kit(EnvironmentContract, make)
    assert report.failed == (), report
    skipped = {result.clause for result in report.results if result.outcome != "passed"}
    assert skipped == {"seeds_differ", "bad_tasks_are_errors"}  # neither is declared


def test_a_sound_environment_of_tool_calls_passes_every_clause():
    report = run_kit(EnvironmentContract, functools.partial(tool_game, environment_mistakes.Sound))
    assert [result for result in report.results if result.outcome != "passed"] == []


def test_every_clause_has_a_broken_environment():
    assert {*BROKEN, *MISTAKES.values()} - {""} == set(clauses(EnvironmentContract))


@pytest.mark.parametrize(("mistake", "clause"), [(m, c) for m, c in MISTAKES.items() if c])
def test_a_mistake_of_an_author_is_caught(mistake, clause):
    report = run_kit(EnvironmentContract, functools.partial(tool_game, mistake), only=[clause])
    assert report.failed == (clause,), report


def test_nearly_all_mistakes_are_caught():
    missed = [mistake.__name__ for mistake, clause in MISTAKES.items() if not clause]
    assert missed == ["PlaysOnAfterTheEnd"] and len(MISTAKES) == 43


def test_state_that_is_declared_to_be_shared_may_change():
    class Declared(EnvironmentContract):
        shared_state = ("HistoryInTheClass.history",)

    make = functools.partial(tool_game, environment_mistakes.HistoryInTheClass)
    assert run_kit(Declared, make, only=["classes_stay_as_they_are"]).passed


@pytest.mark.parametrize(
    ("clause", "broken"),
    [pytest.param(c, b, id=f"{c}-{b.args[0].__name__}") for c, many in BROKEN.items() for b in many],
)
def test_a_broken_environment_fails_its_clause(clause, broken):
    before = copy.deepcopy(TASK)
    try:
        report = run_kit(EnvironmentContract, broken, only=[clause])
    finally:
        TASK.update(before)
    assert report.failed == (clause,), report


def test_an_environment_without_an_example_is_told():
    (result,) = run_kit(EnvironmentContract, lambda: Sound, only=["seedable"]).results
    assert result.outcome == "failed"
    assert "EnvironmentCase(environment=Sound" in result.message
