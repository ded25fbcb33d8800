"""The contract of a reward against rewards broken on purpose, one at least for each clause."""

from __future__ import annotations

import asyncio
import math
import os
import random
import threading
import time

import pytest

from nemo_rl_core.testing import RewardContract, run_kit
from nemo_rl_core.testing.conformance.frame.kit import clauses


class Kit(RewardContract):
    bad_rows = ({"prompt": "What is 2 + 2?", "answer": None},)


class ImpatientKit(Kit):
    deadline_s = 1.0


def sound(response, answer):
    if answer is None:
        raise ValueError("the row has no answer")
    return float(response.rstrip(".").endswith(answer))


async def sound_and_async(response, answer):
    await asyncio.sleep(0)
    return {"correct": sound(response, answer)}


def needs_another_column(response, solution):
    return float(response == solution)


def takes_positions_only(response, answer, /):
    return sound(response, answer)


def returns_nan(response, answer):
    return math.nan


def returns_text(response, answer):
    return "0.5"


def returns_nothing(response, answer):
    sound(response, answer)


def returns_numbered(response, answer):
    return {0: sound(response, answer)}


def returns_no_name(response, answer):
    return {}


def names_by_outcome(response, answer):
    return {"right": 1.0} if sound(response, answer) else {"wrong": 0.0}


def raises_on_nothing(response, answer):
    return sound(response, answer) * len(response.split()[0])


def raises_on_a_brace(response, answer):
    return sound(response, answer) + 0 * response.index("." if "{" not in response else "}")


def drawn(response, answer):
    return sound(response, answer) + random.random()


def drops_a_column(response, task):
    return float(response.rstrip(".").endswith(task.pop("answer", "")))


def adds_a_message(messages, answer):
    messages.append({"role": "user", "content": answer})
    return 0.0


def seeds_global_numbers(response, answer):
    random.seed(answer)
    return sound(response, answer)


def prints_the_response(response, answer):
    print(response)
    return sound(response, answer)


def sets_a_variable(response, answer):
    os.environ["EXPECTED_ANSWER"] = answer
    return sound(response, answer)


class HoldsALock:
    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, response, answer):
        with self.lock:
            return sound(response, answer)


class CountsInItsProcess:
    """Another number in each process."""

    def __call__(self, response, answer):
        return float(os.getpid() % 1000)


class ScoresTheLastOneAsked:
    """A buffer that all calls share."""

    response = ""

    def __call__(self, response, answer):
        type(self).response = response
        time.sleep(0.01)
        return sound(type(self).response, answer)


def hangs_on_an_open_block(response, answer):
    while response.startswith("```"):
        pass
    return sound(response, answer)


async def blocks_the_loop(response, answer):
    time.sleep(0.06)
    return sound(response, answer)


def zero_for_a_bad_row(response, answer):
    return 0.0 if answer is None else sound(response, answer)


def ends_its_process(response, answer):
    if answer is None:
        os._exit(1)
    return sound(response, answer)


BROKEN = {
    "arguments_by_name": [needs_another_column, takes_positions_only],
    "returns_finite_numbers": [returns_nan, returns_text, returns_nothing, returns_numbered, returns_no_name],
    "names_are_stable": [names_by_outcome],
    "any_response": [raises_on_nothing, raises_on_a_brace],
    "deterministic": [drawn],
    "inputs_are_left_alone": [drops_a_column, adds_a_message],
    "process_stays_as_it_is": [seeds_global_numbers, prints_the_response, sets_a_variable],
    "pickles": [HoldsALock()],
    "same_everywhere": [CountsInItsProcess(), drawn],
    "concurrent_calls": [ScoresTheLastOneAsked()],
    "deadline": [hangs_on_an_open_block],
    "event_loop_goes_on": [blocks_the_loop],
    "bad_rows_are_errors": [zero_for_a_bad_row, ends_its_process],
}


@pytest.mark.parametrize("reward", [sound, sound_and_async])
def test_a_sound_reward_passes_every_clause(reward):
    report = run_kit(Kit, lambda: reward)
    skipped = [] if reward is sound_and_async else ["event_loop_goes_on"]
    assert report.failed == ()
    assert [result.clause for result in report.results if result.outcome == "skipped"] == skipped


def test_every_clause_has_a_broken_reward():
    assert set(BROKEN) == set(clauses(RewardContract))


@pytest.mark.parametrize(("clause", "broken"), [(c, b) for c, many in BROKEN.items() for b in many])
def test_a_broken_reward_fails_its_clause(clause, broken):
    report = run_kit(ImpatientKit, lambda: broken, only=[clause])
    assert report.failed == (clause,), report


def test_a_clause_says_which_response_hangs():
    (result,) = run_kit(ImpatientKit, lambda: hangs_on_an_open_block, only=["deadline"]).results
    assert "```python" in result.message and "did not answer in 1 s" in result.message
