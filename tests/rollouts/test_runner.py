from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import threading
import time

import pytest

from nemo_rl_core.errors import DeadlineExceeded, WorkerDied
from nemo_rl_core.protocols.environment import EnvironmentStep
from nemo_rl_core.rollouts.runner import RolloutRunner
from nemo_rl_core.rollouts.scoring.reward_env import reward_environment
from nemo_rl_core.testing.scripted_generation import ScriptedGeneration, ScriptedReply

TASK = {"prompt": "2+2"}


def constant(response):
    return 1.0


@pytest.fixture
def make_runner(make_engine):
    runners = []

    def make(script, environment=None, *, blocked_timeout_s=None, **config):
        environment = environment or reward_environment(constant, isolation="inline")
        runner = RolloutRunner(make_engine(script, environment, **config), blocked_timeout_s=blocked_timeout_s)
        runners.append(runner)
        return runner

    yield make
    for runner in runners:
        runner.shutdown(1.0)


def submit(runner, group_id=0, **kwargs):
    return runner.submit(group_id, f"t{group_id}", TASK, group_size=2, weight_version=0, **kwargs)


def test_groups_come_through_futures(make_runner):
    runner = make_runner("a")
    groups = [future.result(20) for future in [submit(runner, i) for i in range(5)]]
    assert [g.group_id for g in groups] == list(range(5))
    assert all(g.rewards == [1.0, 1.0] for g in groups)


def test_it_lives_in_a_named_daemon_thread(make_runner):
    runner = make_runner("a")
    submit(runner).result(20)
    (thread,) = [t for t in threading.enumerate() if t.name == "nemo-rl-rollouts"]
    assert thread.daemon
    runner.shutdown()
    assert not thread.is_alive()


def test_cancel_all_cancels_and_the_runner_goes_on(make_runner, tokenizer):
    generation = ScriptedGeneration(lambda request: ScriptedReply(hang=True), tokenizer)
    runner = make_runner(generation)
    futures = [submit(runner, i) for i in range(3)]
    while generation.num_active < 6:
        time.sleep(0.01)
    runner.cancel_all()
    concurrent.futures.wait(futures, 20)
    assert all(future.cancelled() for future in futures)
    generation._script = lambda request: "a"
    assert submit(runner, 9).result(20).rewards == [1.0, 1.0]
    assert generation.num_active == 0 and generation.num_cancelled == 6


def test_shutdown_ends_what_runs_and_refuses_more(make_runner, tokenizer):
    generation = ScriptedGeneration(lambda request: ScriptedReply(hang=True), tokenizer)
    runner = make_runner(generation)
    future = submit(runner)
    runner.shutdown()
    with pytest.raises((WorkerDied, concurrent.futures.CancelledError)):
        future.result(20)
    with pytest.raises(WorkerDied, match="shut down"):
        submit(runner)
    runner.shutdown()


def test_an_error_of_the_engine_reaches_who_waits(make_runner):
    async def fail():
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        make_runner("a").run(fail()).result(20)


def test_what_a_watch_finds_reaches_everyone_who_waits(make_runner, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr("nemo_rl_core.rollouts.runner._CHECK_EVERY_S", 0.1)
    died = threading.Event()

    def check():
        if died.is_set():
            raise WorkerDied("the policy worker of rank 0 is gone")

    runner = make_runner(ScriptedGeneration(lambda request: ScriptedReply(hang=True), tokenizer))
    runner.watch_over(check)
    futures = [submit(runner, i) for i in range(2)]
    assert concurrent.futures.wait(futures, 1.5).done == set()
    died.set()
    for future in futures:
        with pytest.raises(WorkerDied, match="rank 0 is gone"):
            future.result(20)
    runner.shutdown()
    assert not caplog.records  # what was under way has ended in silence


def test_a_blocked_loop_fails_every_waiter_and_names_the_line(make_runner, tokenizer):
    release = threading.Event()

    class Blocking:
        config_class = dict

        def __init__(self, context):
            pass

        def reset(self, task, seed):
            return [{"role": "user", "content": "x"}]

        def step(self, message):
            release.wait(30)  # blocks the loop

        def close(self):
            pass

    runner = make_runner("a", Blocking, blocked_timeout_s=0.3)
    futures = [submit(runner, i) for i in range(2)]
    try:
        for future in futures:
            with pytest.raises(DeadlineExceeded, match=r"stood still for 0\.3 s at .*test_runner.py:\d+ in step"):
                future.result(20)
        with pytest.raises(DeadlineExceeded):
            submit(runner, 3)
    finally:
        release.set()


def test_coroutines_of_the_engine_share_its_loop(make_runner):
    runner = make_runner("a")

    async def where():
        return threading.current_thread().name, asyncio.get_running_loop()

    name, loop = runner.run(where()).result(20)
    assert name == "nemo-rl-rollouts" and loop is runner._loop


def test_garbage_collection_is_relaxed_while_it_lives_and_restored(make_runner):
    before = gc.get_threshold()
    runner = make_runner("a")
    submit(runner).result(20)
    assert gc.get_threshold()[0] > before[0]
    runner.shutdown()
    assert gc.get_threshold() == before and gc.get_freeze_count() == 0


def test_gathering_holds_the_engine_until_all_have_asked(make_runner, tokenizer):
    waiting = []
    generation = ScriptedGeneration(lambda request: waiting.append(generation.num_active) or "a", tokenizer)
    runner = make_runner(generation, max_in_flight=6)
    with runner.gathering(timeout_s=20):
        futures = [submit(runner, i) for i in range(5)]
    assert all(future.result(20).rewards == [1.0, 1.0] for future in futures)
    assert waiting[0] == 6
    assert [request.order for request in generation.requests[:6]] == [(g, i, 0) for g in range(3) for i in range(2)]


def test_gathering_does_not_wait_for_slow_environments(make_runner):
    class Slow:
        config_class = dict

        def __init__(self, context):
            pass

        async def reset(self, task, seed):
            await asyncio.sleep(0.5)
            return [{"role": "user", "content": "x"}]

        def step(self, message):
            return EnvironmentStep(rewards={"reward": 1.0}, terminated=True)

        def close(self):
            pass

    runner = make_runner("a", Slow)
    with runner.gathering(timeout_s=0.05):
        future = submit(runner)
    assert not future.done()
    assert future.result(20).rewards == [1.0, 1.0]


def test_a_task_that_exits_ends_nobody_else(make_runner, caplog):
    """asyncio throws SystemExit of any task out of the loop that all rollouts share."""
    runner = make_runner("a")

    async def leave():
        raise SystemExit(0)

    async def start():
        tasks.append(asyncio.create_task(leave()))

    tasks = []
    runner.run(start()).result(20)
    assert submit(runner).result(20).rewards == [1.0, 1.0]
    assert isinstance(tasks[0].exception(), SystemExit)  # else asyncio would tell of it amid another test
    assert "A task on the rollout loop raised SystemExit(0)" in caplog.text
