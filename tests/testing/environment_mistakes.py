"""Mistakes that authors of environments make: each a small environment with one of them.

The game is that of a tool: the policy guesses a number by calls such as `<call>{"tool": "guess", "arguments":
{"number": 5}}</call>`. It imports little, because processes in which a kit replays an episode load it, too.
"""

from __future__ import annotations

import datetime
import decimal
import json
import logging
import os
import random
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from attrs import define, field, frozen

from nemo_rl_core.protocols.environment import EnvironmentStep

CALL = re.compile(r"<call>(.*?)</call>", re.DOTALL)
TASK = {"prompt": "Guess a number from 1 to 9.", "number": 7, "hints": ["It is odd."]}


def call(number):
    return f'<call>{{"tool": "guess", "arguments": {{"number": {number}}}}}</call>'


@frozen
class Options:
    limit: int = 4


class Sound:
    """What all of them would be without their mistake."""

    config_class = Options

    def __init__(self, config, context):
        self.config = config
        self.context = context
        self.task = {}
        self.turn = 0
        self.sign = ""

    def reset(self, task, seed):
        if not isinstance(task.get("number"), int):
            raise ValueError(f"the row has no number: {task!r:.80}")
        self.task, self.turn = task, 0
        self.sign = random.Random(seed).choice(["!", "?", "."])
        return [{"role": "system", "content": "A game."}, {"role": "user", "content": task["prompt"] + self.sign}]

    async def step(self, message):
        self.turn += 1
        guess = self.read(message["content"])
        if guess == self.task["number"]:
            return self.ended(1.0, terminated=True)
        if self.turn == self.config.limit:
            return self.ended(0.0, truncated=True)
        if guess is None:
            return self.answer("There is no such call.")
        return self.answer("too small" if guess < self.task["number"] else "too large")

    def read(self, text):
        """The guess in a turn, or None."""
        found = CALL.search(text)
        try:
            call = json.loads(found.group(1)) if found else None
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, Mapping) or call.get("tool") != "guess":
            return None
        arguments = call.get("arguments")
        number = arguments.get("number") if isinstance(arguments, Mapping) else None
        return number if type(number) is int else None

    def answer(self, text):
        return EnvironmentStep(messages=[{"role": "tool", "content": text + self.sign}])

    def ended(self, reward, **how):
        return EnvironmentStep(rewards={"found": reward}, info={"turns": self.turn}, **how)

    def close(self):
        pass


# -- state that episodes share ------------------------------------------------------------------------------


class HistoryInTheClass(Sound):
    history: ClassVar[list] = []

    async def step(self, message):
        self.history.append(message["content"])
        return await super().step(message)


class CurrentTaskInTheModule(Sound):
    def reset(self, task, seed):
        global current_task
        current_task = task
        return super().reset(task, seed)

    async def step(self, message):
        self.task = current_task
        return await super().step(message)


current_task: Mapping = {}


class MutableDefault(Sound):
    def __init__(self, config, context, guesses=[]):  # noqa: B006
        super().__init__(config, context)
        self.guesses = guesses

    async def step(self, message):
        self.guesses.append(self.turn)
        return await super().step(message)


class NumberInAVariable(Sound):
    def reset(self, task, seed):
        os.environ["GAME_NUMBER"] = str(task["number"])
        return super().reset(task, seed)

    async def step(self, message):
        self.task = {**self.task, "number": int(os.environ["GAME_NUMBER"])}
        return await super().step(message)


class ClosesForAll(Sound):
    """One connection for all episodes, which each closes."""

    connection: ClassVar[dict] = {"open": False}

    def reset(self, task, seed):
        self.connection["open"] = True
        return super().reset(task, seed)

    async def step(self, message):
        if not self.connection["open"]:
            raise ConnectionError("the connection is closed")
        return await super().step(message)

    def close(self):
        self.connection["open"] = False


class KeepsEveryEpisode(Sound):
    episodes: ClassVar[dict] = {}

    def reset(self, task, seed):
        self.episodes[len(self.episodes)] = self
        return super().reset(task, seed)


@define
class MutableOptions:
    limit: int = 4


class CountsDownItsOptions(Sound):
    config_class = MutableOptions

    def reset(self, task, seed):
        self.limit, self.config.limit = self.config.limit, max(1, self.config.limit - 1)
        return super().reset(task, seed)


class EditsTheTask(Sound):
    async def step(self, message):
        self.task["hints"].append(message["content"])
        return await super().step(message)


# -- what an episode depends on -----------------------------------------------------------------------------


class DrawsFromGlobalNumbers(Sound):
    def answer(self, text):
        return super().answer(f"{text} {random.random()}")


class SeedsGlobalNumbers(Sound):
    def reset(self, task, seed):
        random.seed(seed)
        return super().reset(task, seed)


class SeedsNumpy(Sound):
    def reset(self, task, seed):
        np.random.seed(seed)
        return super().reset(task, seed)


class ListsASet(Sound):
    def reset(self, task, seed):
        tools = {"guess", "give_up", "ask", "wait"}
        return [*super().reset(task, seed), {"role": "user", "content": f"Tools: {', '.join(tools)}"}]


class ChoosesByHash(Sound):
    def reset(self, task, seed):
        prompt = super().reset(task, seed)
        self.sign = ["!", "?", ".", ";", ":"][hash(task["prompt"]) % 5]
        return prompt


class TellsTheDate(Sound):
    def reset(self, task, seed):
        today = datetime.date.today()
        return [*super().reset(task, seed), {"role": "user", "content": f"It is {today}."}]


class IgnoresTheSeed(Sound):
    """Said to be drawn from the seed."""

    def reset(self, task, seed):
        return super().reset(task, 0)


# -- blocking ---------------------------------------------------------------------------------------------


class SleepsAMoment(Sound):
    async def step(self, message):
        time.sleep(0.06)
        return await super().step(message)


class WaitsForAProgram(Sound):
    async def step(self, message):
        subprocess.run(["sleep", "0.1"], check=True)
        return await super().step(message)


# -- rewards ----------------------------------------------------------------------------------------------


class NumpyReward(Sound):
    def ended(self, reward, **how):
        return super().ended(np.float32(reward), **how)


class BoolReward(Sound):
    def ended(self, reward, **how):
        return super().ended(reward == 1.0, **how)


class DecimalReward(Sound):
    def ended(self, reward, **how):
        return super().ended(decimal.Decimal(reward), **how)


class DividesByZero(Sound):
    """The average over correct guesses, of which a lost game has none."""

    def ended(self, reward, **how):
        return super().ended(reward if reward else float("nan"), **how)


class NoRewardWhenCutOff(Sound):
    def ended(self, reward, **how):
        return EnvironmentStep(rewards={"found": reward} if how.get("terminated") else {}, **how)


class OneDictOfRewards(Sound):
    """Adds up what the engine adds up."""

    def reset(self, task, seed):
        self.rewards = {"found": 0.0}
        return super().reset(task, seed)

    def answer(self, text):
        self.rewards["found"] += 0.1
        return EnvironmentStep(messages=super().answer(text).messages, rewards=self.rewards)


# -- messages ---------------------------------------------------------------------------------------------


class EchoesTheTurn(Sound):
    async def step(self, message):
        step = await super().step(message)
        return EnvironmentStep(
            messages=[dict(message), *step.messages] if step.messages else (),
            rewards=step.rewards,
            terminated=step.terminated,
            truncated=step.truncated,
        )


class ReturnsTheWholeConversation(Sound):
    def reset(self, task, seed):
        self.conversation = super().reset(task, seed)
        return list(self.conversation)

    def answer(self, text):
        self.conversation += super().answer(text).messages
        return EnvironmentStep(messages=list(self.conversation))


class OneListForAllAnswers(Sound):
    def reset(self, task, seed):
        self.answers = []
        return super().reset(task, seed)

    def answer(self, text):
        self.answers[:] = super().answer(text).messages
        return EnvironmentStep(messages=self.answers)


class RewritesTheTurn(Sound):
    async def step(self, message):
        step = await super().step(message)
        message["content"] = message["content"].strip("<>")
        return step


class AnswerWithoutContent(Sound):
    def answer(self, text):
        tool_call = {"role": "tool", "content": None, "name": "guess"}
        return EnvironmentStep(messages=[tool_call, *super().answer(text).messages])


# -- ends -------------------------------------------------------------------------------------------------


class BothEnds(Sound):
    def ended(self, reward, **how):
        return super().ended(reward, terminated=True, truncated=self.turn == self.config.limit)


class PlaysOnAfterTheEnd(Sound):
    """A step after the end is one of a new game."""

    async def step(self, message):
        step = await super().step(message)
        if step.terminated:
            self.turn = 0
        return step


# -- what it leaves behind ----------------------------------------------------------------------------------


class LeavesAThread(Sound):
    def reset(self, task, seed):
        self.done = threading.Event()
        threading.Thread(target=self.done.wait, name="watchdog", daemon=True).start()
        return super().reset(task, seed)


class LeavesAProcess(Sound):
    def reset(self, task, seed):
        self.server = subprocess.Popen(["sleep", "5"])
        return super().reset(task, seed)


class LeavesAFile(Sound):
    def reset(self, task, seed):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        return super().reset(task, seed)


class Prints(Sound):
    async def step(self, message):
        print("guess:", message["content"])
        return await super().step(message)


class SilencesLogging(Sound):
    def reset(self, task, seed):
        logging.getLogger().setLevel(logging.CRITICAL)
        return super().reset(task, seed)


class ClosesOnce(Sound):
    def close(self):
        del self.task


@frozen
class OptionsWithALock:
    limit: int = 4
    lock: threading.Lock = field(factory=threading.Lock)


class CannotBeSent(Sound):
    config_class = OptionsWithALock


# -- malformed calls ----------------------------------------------------------------------------------------


class CrashesOnCutJson(Sound):
    def read(self, text):
        found = CALL.search(text)
        return super().read(text) if found is None or json.loads(found.group(1)) else None


class CrashesOnAnUnknownTool(Sound):
    def read(self, text):
        number = super().read(text)
        found = re.search(r'"tool": "(\w[^"]*)"', text)
        return {"guess": number}[found.group(1)] if found else number


class CrashesOnAnotherType(Sound):
    def read(self, text):
        found = re.search(r'"number": ("[^"]*"|\[)', text)
        return 1 + found.group(1) if found else super().read(text)


class CrashesWithoutTheArgument(Sound):
    def read(self, text):
        found = re.search(r'"arguments": (\{[^{}]*\})', text)
        if found and super().read(text) is None and "tool" in text:
            try:
                arguments = json.loads(found.group(1))
            except ValueError:
                return None
            arguments["number"]
        return super().read(text)


class LosesTheRewardOfAMalformedCall(Sound):
    """Ends the episode on what it cannot read, without a reward."""

    def answer(self, text):
        if text.startswith("There is no"):
            return EnvironmentStep(truncated=True) if self.turn > 1 else super().answer(text)
        return super().answer(text)


# -- tasks ------------------------------------------------------------------------------------------------


class TakesAnyTask(Sound):
    """A row without its answer is played, and earns nothing, whatever is said."""

    def reset(self, task, seed):
        return super().reset({"number": -1, **task}, seed)


MISTAKES = {
    HistoryInTheClass: "classes_stay_as_they_are",
    CurrentTaskInTheModule: "is_forgotten",
    MutableDefault: "classes_stay_as_they_are",
    NumberInAVariable: "process_stays_as_it_is",
    ClosesForAll: "instances_are_independent",
    KeepsEveryEpisode: "is_forgotten",
    CountsDownItsOptions: "options_are_left_alone",
    EditsTheTask: "task_is_left_alone",
    DrawsFromGlobalNumbers: "seedable",
    SeedsGlobalNumbers: "process_stays_as_it_is",
    SeedsNumpy: "process_stays_as_it_is",
    ListsASet: "same_in_another_process",
    ChoosesByHash: "same_in_another_process",
    TellsTheDate: "same_in_another_process",
    IgnoresTheSeed: "seeds_differ",
    SleepsAMoment: "event_loop_goes_on",
    WaitsForAProgram: "event_loop_goes_on",
    NumpyReward: "step_gives_an_answer",
    BoolReward: "step_gives_an_answer",
    DecimalReward: "step_gives_an_answer",
    DividesByZero: "step_gives_an_answer",
    NoRewardWhenCutOff: "reward_names_are_stable",
    OneDictOfRewards: "answers_stay_as_given",
    EchoesTheTurn: "goes_on_with_messages",
    ReturnsTheWholeConversation: "goes_on_with_messages",
    OneListForAllAnswers: "answers_stay_as_given",
    RewritesTheTurn: "prefix_is_kept",
    AnswerWithoutContent: "step_gives_an_answer",
    BothEnds: "tells_ends_apart",
    PlaysOnAfterTheEnd: "",  # the engine never steps after the end
    LeavesAThread: "leaves_nothing_running",
    LeavesAProcess: "leaves_nothing_running",
    LeavesAFile: "leaves_nothing_running",
    Prints: "prints_nothing",
    SilencesLogging: "process_stays_as_it_is",
    ClosesOnce: "close_twice",
    CannotBeSent: "same_in_another_process",
    CrashesOnCutJson: "malformed_turns",
    CrashesOnAnUnknownTool: "malformed_turns",
    CrashesOnAnotherType: "malformed_turns",
    CrashesWithoutTheArgument: "malformed_turns",
    LosesTheRewardOfAMalformedCall: "malformed_turns",
    TakesAnyTask: "bad_tasks_are_errors",
}
"""The clause that catches each; empty for one that none does."""
