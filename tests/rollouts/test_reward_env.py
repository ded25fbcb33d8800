from __future__ import annotations

import asyncio
import functools
import logging
import math
import threading

import pytest

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.rollouts.scoring.process_pool import ProcessPool
from nemo_rl_core.rollouts.scoring.reward_env import reward_environment

TASK = {"prompt": "2+2", "answer": "4", "source": "book"}


def exact(response, answer):
    return float(response == answer)


def sees_all(prompt, response, messages, task, completion_ids, answer, unit="none", source=None):
    ok = (
        (prompt, response, answer, unit, source) == ("2+2", "4", "4", "none", "book")
        and [m["role"] for m in messages] == ["user", "assistant"]
        and task["answer"] == "4"
        and completion_ids[-1] == 1
        and len(completion_ids) == 2
    )
    return {"ok": float(ok), "length": len(completion_ids)}


def takes_any(response, **columns):
    return float(columns["answer"] == response and columns["source"] == "book" and "prompt" in columns)


def raises(response):
    raise ValueError("cannot parse this")


def hangs_on_five(response):
    while response == "5":
        pass
    return 1.0


def needs_more(response, solution):
    return 0.0


def clashes(response, timeout_s, function):
    return float(timeout_s == 3 and function == "f")


async def slow(response):
    await asyncio.sleep(3600 if response == "5" else 0)
    return 1.0


class Judge:
    def __init__(self, value):
        self.value = value

    def __call__(self, response):
        return self.value


class AsyncJudge:
    async def __call__(self, response):
        await asyncio.sleep(0)
        return 0.5


class Unpicklable:
    def __init__(self):
        self.released = threading.Event()

    def __call__(self, response):
        if response == "5":
            self.released.wait()
        return 0.25


def score(make_engine, run_group, reward, script="4", task=TASK, isolation="process", **config):
    engine = make_engine(script, reward_environment(reward, isolation=isolation), **config)
    return run_group(engine, task, group_size=2)


@pytest.mark.parametrize("isolation", ["process", "thread", "inline"])
def test_arguments_are_matched_by_name(make_engine, run_group, isolation):
    group = score(make_engine, run_group, sees_all, isolation=isolation)
    assert [r.rewards for r in group.rollouts] == [{"ok": 1.0, "length": 2.0}] * 2


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (exact, 1.0),
        (takes_any, 1.0),
        (lambda response: True, 1.0),
        (functools.partial(exact, answer="5"), 0.0),
        (Judge(0.75), 0.75),
        (AsyncJudge(), 0.5),
        (slow, 1.0),
        (Unpicklable(), 0.25),
    ],
    ids=["function", "kwargs", "lambda", "partial", "object", "async object", "async", "unpicklable"],
)
def test_what_may_be_a_reward(make_engine, run_group, reward, expected):
    group = score(make_engine, run_group, reward)
    assert [r.error for r in group.rollouts] == [None, None]
    assert group.rewards == [expected] * 2


def test_arguments_named_like_those_of_the_pool(make_engine, run_group):
    group = score(make_engine, run_group, clashes, task={**TASK, "timeout_s": 3, "function": "f"})
    assert group.rewards == [1.0, 1.0]


def test_the_prompt_is_the_last_user_message(make_engine, run_group):
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2"}]
    group = score(make_engine, run_group, lambda prompt: float(prompt == "2+2"), task={"prompt": prompt})
    assert group.rewards == [1.0, 1.0]


@pytest.mark.parametrize("isolation", ["process", "thread", "inline"])
def test_a_reward_that_raises_is_an_error_and_no_zero(make_engine, run_group, isolation):
    group = score(make_engine, run_group, raises, isolation=isolation)
    assert group.valid == [] and group.rewards == []
    error = group.rollouts[0].error
    assert (error.stage, error.type) == ("score", "RewardError")
    assert "reward raises raised ValueError: cannot parse this" in error.message


@pytest.mark.parametrize("value", [math.nan, -math.inf, None, "1.0", {"a": math.nan}, [1.0], 1j])
def test_a_reward_that_is_not_a_finite_number_is_an_error(make_engine, run_group, value):
    group = score(make_engine, run_group, Judge(value), isolation="inline")
    error = group.rollouts[0].error
    assert (error.stage, error.type) == ("score", "RewardError")
    assert "reward Judge returned" in error.message


def test_numbers_of_other_libraries_are_numbers(make_engine, run_group):
    import numpy
    import torch

    for value in (numpy.float32(0.5), torch.tensor(0.5), 1, True):
        group = score(make_engine, run_group, Judge(value), isolation="inline")
        assert group.rewards == [float(value)] * 2


def test_a_hanging_reward_is_killed_and_the_others_go_on(make_engine, run_group):
    pool = ProcessPool(1, default_timeout_s=20.0)
    try:
        engine = make_engine(
            lambda request: "5" if request.request_id.split("/")[-2] == "1" else "4",
            reward_environment(hangs_on_five),
            reward_timeout_s=0.3,
            pool=pool,
        )
        group = run_group(engine, TASK, group_size=4)
        assert [r.failed for r in group.rollouts] == [False, True, False, False]
        error = group.rollouts[1].error
        assert (error.stage, error.type) == ("score", "RewardError")
        assert "hangs_on_five did not answer in 0.3 s; its process was killed" in error.message
        assert pool.num_killed == 1
    finally:
        pool.shutdown()


def assert_left_behind(group):
    assert [r.error.type for r in group.rollouts] == ["RewardError"] * 2
    assert "did not answer in 0.2 s" in group.rollouts[0].error.message


def test_a_hanging_async_reward_is_left_behind(make_engine, run_group):
    assert_left_behind(score(make_engine, run_group, slow, script="5", reward_timeout_s=0.2))


def test_a_hanging_reward_in_a_thread_is_left_behind(make_engine, run_group):
    """It goes on only when the group is there; who waits for it waits for ever."""
    reward = Unpicklable()
    try:
        assert_left_behind(score(make_engine, run_group, reward, script="5", reward_timeout_s=0.2))
    finally:
        reward.released.set()


def test_what_cannot_be_pickled_falls_back_to_a_thread_with_one_warning(make_engine, run_group, caplog):
    with caplog.at_level(logging.WARNING):
        group = score(make_engine, run_group, Unpicklable())
    assert group.rewards == [0.25, 0.25]
    warnings = [r.getMessage() for r in caplog.records if "cannot be pickled" in r.getMessage()]
    assert len(warnings) == 1 and "Unpicklable" in warnings[0]


def test_a_missing_column_names_what_there_is(make_engine, run_group):
    factory = reward_environment(needs_more)
    message = "needs the argument 'solution'.*Known: prompt, response.*Columns: answer, prompt, source.*columns"
    with pytest.raises(ConfigError, match=message):
        factory.check(TASK)
    factory.check({**TASK, "solution": "4"})
    group = score(make_engine, run_group, needs_more)
    assert group.rollouts[0].error.type == "RewardError"
    assert "'solution'" in group.rollouts[0].error.message


def test_a_row_without_a_prompt_says_so(make_engine, run_group):
    error = score(make_engine, run_group, exact, task={"question": "2+2"}).rollouts[0].error
    assert error.type == "RewardError" and "no column 'prompt'. Columns: question" in error.message


def test_mistakes_are_found_before_a_rollout():
    with pytest.raises(ConfigError, match="must be a function, not 3"):
        reward_environment(3)
    with pytest.raises(ConfigError, match="positional-only arguments"):
        reward_environment(eval_positional)
    with pytest.raises(ConfigError, match='Allowed: "process", "thread", "inline"'):
        reward_environment(exact, isolation="fork")


def eval_positional(response, /):
    return 0.0


def test_an_empty_completion_is_scored_as_the_empty_response(make_engine, run_group):
    group = score(make_engine, run_group, lambda response: float(response == ""), script=lambda request: [1])
    assert group.rewards == [1.0, 1.0]
