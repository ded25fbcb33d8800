"""The math environment against recorded verdicts, and its failures."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nemo_rl_core.errors import DataError, DeadlineExceeded, RewardError
from nemo_rl_plugins_env_math.environment import MathConfig, MathEnvironment
from nemo_rl_plugins_env_math.reward import math_verify_reward
from nemo_rl_plugins_env_math.scoring import last_boxed, score_math

SAMPLE = [json.loads(line) for line in (Path(__file__).parent / "sample_rollouts.jsonl").read_text().splitlines()]


class Inline:
    """Runs the function here and remembers the deadline it was given."""

    async def run_in_pool(self, function, *args, timeout_s=None, **kwargs):
        self.timeout_s = timeout_s
        return function(*args, **kwargs)


class Expired:
    """A pool in which every call passes its deadline."""

    async def run_in_pool(self, function, *args, timeout_s=None, **kwargs):
        raise DeadlineExceeded("worker killed")


class InProcess:
    """A real worker process, so that arguments and results are pickled."""

    def __init__(self):
        self.pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    async def run_in_pool(self, function, *args, timeout_s=None, **kwargs):
        return self.pool.submit(function, *args, **kwargs).result(60)


def play(response, task, context=None, **options):
    environment = MathEnvironment(MathConfig(**options), context or Inline())
    prompt = environment.reset({"prompt": "q", **task}, seed=0)
    assert prompt == [{"role": "user", "content": "q"}]
    return asyncio.run(environment.step({"role": "assistant", "content": response}))


@pytest.mark.parametrize("row", SAMPLE, ids=lambda row: str(row["expected_answer"])[:12])
def test_sample(row):
    step = play(row["response"], {"expected_answer": row["expected_answer"]})
    assert step.rewards == {"correct": row["library_reward"]} and step.terminated
    assert math_verify_reward(row["response"], expected_answer=row["expected_answer"]) == dict(step.rewards)


def test_recorded_gym_rollouts_get_the_recorded_verdict():
    name = Path("shared/data/gym/math_with_judge/example_rollouts.jsonl")
    path = next((p / name for p in Path(__file__).resolve().parents if (p / name).is_file()), None)
    if path is None:
        pytest.skip(f"{name} is not above this checkout")
    for line in path.read_text().splitlines():
        record = json.loads(line)
        parts = [c for item in record["response"]["output"] if item["type"] == "message" for c in item["content"]]
        text = "".join(part["text"] for part in parts)
        assert float(score_math(text, record["expected_answer"]).correct) == record["library_reward"]


def test_the_first_answer_column_of_the_row_is_used():
    assert play("4", {"solution": "5", "answer": "4"}).rewards == {"correct": 1.0}
    assert play("4", {"solution": "5", "answer": "4"}, answer_columns=("solution",)).rewards == {"correct": 0.0}
    with pytest.raises(DataError, match=r"none of 'answer'.*It has: 'prompt', 'gold'"):
        play("4", {"gold": "4"})


def test_strict_boxed():
    assert play("The answer is 4.", {"answer": 4}, strict_boxed=True).rewards == {"correct": 0.0}
    assert play(r"Not \boxed{5} but \boxed{4}.", {"answer": 4}, strict_boxed=True).rewards == {"correct": 1.0}


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"a \boxed{1} b \boxed{\frac{1}{2}} c", r"\boxed{\frac{1}{2}}"),
        (r"\boxed {3}", r"\boxed {3}"),
        (r"\boxed{1} and \boxed{2", r"\boxed{1}"),
        ("none", None),
    ],
)
def test_last_boxed(text, boxed):
    assert last_boxed(text) == boxed


def test_only_the_end_of_a_long_response_is_read():
    text = "The answer is 4. " + "word " * 100
    assert play(text, {"answer": 4}, max_characters=50).rewards == {"correct": 0.0}
    assert play(text, {"answer": 4}, max_characters=None).rewards == {"correct": 1.0}


def test_what_is_recorded_beside_the_reward():
    assert play(r"\boxed{5}", {"answer": 4}).info == {"extracted_answer": "5", "no_answer": 0.0, "timeout": 0.0}
    assert play("dunno", {"answer": 4}).info == {"extracted_answer": None, "no_answer": 1.0, "timeout": 0.0}


def test_a_passed_deadline_counts_as_wrong_and_is_counted():
    step = play("4", {"answer": 4}, context=Expired())
    assert step.rewards == {"correct": 0.0}
    assert step.info == {"extracted_answer": None, "no_answer": 0.0, "timeout": 1.0}
    context = Inline()
    play("4", {"answer": 4}, context=context, timeout_s=2.5)
    assert context.timeout_s == 2.5


def test_unreadable_data_is_an_error_not_a_zero():
    with pytest.raises(RewardError, match="cannot be read as mathematics"):
        play("4", {"answer": ""})
    with pytest.raises(DataError, match="no column"):
        math_verify_reward("4")


def test_it_works_off_the_main_thread():
    """math-verify's own limit raises there; ours must not use it."""
    found = []
    thread = threading.Thread(target=lambda: found.append(score_math(r"\boxed{0.5}", r"\frac{1}{2}")))
    thread.start()
    thread.join()
    assert [verdict.correct for verdict in found] == [True]


def test_through_a_real_process():
    context = InProcess()
    try:
        assert play(r"\boxed{0.5}", {"answer": r"\frac12"}, context=context).rewards == {"correct": 1.0}
    finally:
        context.pool.shutdown()


def test_importing_the_environment_does_not_import_the_verifier():
    code = (
        "import sys, nemo_rl_plugins_env_math.environment, nemo_rl_plugins_env_math.reward; "
        "sys.exit(any(m in sys.modules for m in ('math_verify', 'sympy', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
