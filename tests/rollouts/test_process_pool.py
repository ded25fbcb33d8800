from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from nemo_rl_core.errors import DeadlineExceeded, PluginIncompatible, RewardError, WorkerDied
from nemo_rl_core.rollouts.scoring.process_pool import ProcessPool


def add(a, b=0):
    return a + b


@contextlib.contextmanager
def closed_pool():
    """A pool of one worker that is shut down afterwards."""
    made = ProcessPool(1, default_timeout_s=20.0)
    yield made
    made.shutdown()


def where():
    return os.getpid()


def loaded_modules():
    return sorted(name for name in ("torch", "transformers", "nemo_rl_core") if name in sys.modules)


def explode(message):
    raise KeyError(message)


def leave():
    raise SystemExit(3)


def slow_where(seconds):
    time.sleep(seconds)
    return os.getpid()


def die_by(number, calls):
    with open(calls, "a") as file:
        file.write("x")
    os.kill(os.getpid(), number)
    time.sleep(20)


def crash():
    print("last words", flush=True)
    os._exit(9)


def loop_for_ever():
    while True:
        pass


def sleep_with_child(path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(path).write_text(str(child.pid))
    child.wait()


class LocalError(Exception):
    def __init__(self, a, b):  # cannot be unpickled from its args
        super().__init__(f"{a} and {b}")


def raise_local():
    raise LocalError("this", "that")


@pytest.fixture
def pool():
    pool = ProcessPool(2, default_timeout_s=20.0)
    yield pool
    pool.shutdown()


def is_alive(pid):
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat").read_text() if Path("/proc").exists() else ") R"
    except (ProcessLookupError, FileNotFoundError):  # the latter: it went between the two
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition, timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_runs_in_another_process_and_returns_the_value(pool):
    assert asyncio.run(pool.run(add, 2, b=3)) == 5
    assert asyncio.run(pool.run(where)) != os.getpid()


def test_nothing_starts_before_the_first_call():
    pool = ProcessPool(2, default_timeout_s=1.0)
    assert pool._thread is None and not pool._workers
    pool.shutdown()


def test_workers_import_no_heavy_module(pool):
    assert asyncio.run(pool.run(eval, "1+1")) == 2
    source = "sorted(n for n in ('torch', 'transformers', 'numpy', 'nemo_rl_core') if n in __import__('sys').modules)"
    assert asyncio.run(pool.run(eval, source)) == []


def test_lambdas_and_closures_go_by_value(pool):
    offset = 10
    assert asyncio.run(pool.run(lambda x: x + offset, 5)) == 15


def test_exceptions_come_back_with_type_message_and_remote_traceback(pool):
    with pytest.raises(KeyError, match="lost") as caught:
        asyncio.run(pool.run(explode, "lost"))
    assert "in explode" in "".join(caught.value.__notes__)


def test_an_exception_that_cannot_be_pickled_keeps_its_message(pool):
    with pytest.raises(RewardError, match="LocalError: this and that"):
        asyncio.run(pool.run(raise_local))
    assert asyncio.run(pool.run(add, 1)) == 1


def test_sys_exit_ends_neither_worker_nor_caller(pool):
    with pytest.raises(RewardError, match="SystemExit"):
        asyncio.run(pool.run(leave))
    assert pool.num_crashed == 0


def test_a_hanging_call_is_killed_and_others_go_on(pool):
    async def both():
        hanging = asyncio.create_task(pool.run(loop_for_ever, timeout_s=0.3))
        others = await asyncio.gather(*(pool.run(add, i) for i in range(20)))
        with pytest.raises(DeadlineExceeded, match=r"loop_for_ever did not answer in 0\.3 s"):
            await hanging
        return others, await pool.run(add, 1, b=1)

    assert asyncio.run(both()) == (list(range(20)), 2)
    assert pool.num_killed == 1


def test_a_kill_reaches_what_the_function_started(pool, tmp_path):
    marker = tmp_path / "pid"
    with pytest.raises(DeadlineExceeded):
        asyncio.run(pool.run(sleep_with_child, str(marker), timeout_s=2.0))
    child = int(marker.read_text())
    assert wait_until(lambda: not is_alive(child))


def test_a_crash_names_exit_status_and_last_output(pool):
    with pytest.raises(WorkerDied, match=r"crash died \(exit status 9\)(.|\n)*last words"):
        asyncio.run(pool.run(crash))
    assert asyncio.run(pool.run(add, 4)) == 4


def test_a_worker_that_is_killed_loses_no_call(pool):
    async def kill_it():
        pid = await pool.run(where)
        call = asyncio.create_task(pool.run(slow_where, 0.6))
        await asyncio.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        return pid, await call

    killed, answered = asyncio.run(kill_it())
    assert answered != killed


def test_a_call_that_ends_two_workers_names_the_signal(pool, tmp_path):
    with pytest.raises(WorkerDied, match=r"die_by died \(signal SIGTERM\), the second one"):
        asyncio.run(pool.run(die_by, signal.SIGTERM, str(tmp_path / "calls")))
    assert (tmp_path / "calls").read_text() == "xx"


def test_a_worker_killed_while_idle_is_replaced():
    pool = ProcessPool(1, default_timeout_s=20.0)
    try:
        os.kill(asyncio.run(pool.run(where)), signal.SIGKILL)
        assert wait_until(lambda: pool.num_crashed == 1)
        assert asyncio.run(pool.run(add, 6)) == 6
    finally:
        pool.shutdown()


def test_a_function_travels_once_to_each_worker():
    pool = ProcessPool(1, default_timeout_s=20.0)
    try:
        asyncio.run(pool.run(add, 1))
        (worker,) = pool._workers
        known = set(worker._known)
        asyncio.run(pool.run(add, 2))
        assert worker._known == known and len(known) == 1
    finally:
        pool.shutdown()


def test_many_functions_do_not_pile_up_in_a_worker(pool):
    async def run_all():
        return [await pool.run(lambda x=i: x) for i in range(300)]

    assert asyncio.run(run_all()) == list(range(300))
    assert all(len(worker._known) <= 256 for worker in pool._workers)


def test_the_queue_is_bounded_and_everyone_is_served():
    pool = ProcessPool(1, default_timeout_s=20.0, max_queued=3)
    longest = 0

    async def watch():
        nonlocal longest
        while True:
            longest = max(longest, len(pool._queue))
            await asyncio.sleep(0)

    async def run_all():
        watching = asyncio.create_task(watch())
        results = await asyncio.gather(*(pool.run(add, i) for i in range(50)))
        watching.cancel()
        return results

    try:
        assert asyncio.run(run_all()) == list(range(50))
        assert 1 <= longest <= 3
    finally:
        pool.shutdown()


def test_time_in_the_queue_does_not_count():
    pool = ProcessPool(1, default_timeout_s=20.0)

    async def run_all():
        return await asyncio.gather(*(pool.run(time.sleep, 0.2, timeout_s=0.6) for _ in range(6)))

    try:
        assert asyncio.run(run_all()) == [None] * 6
    finally:
        pool.shutdown()


def test_calls_from_several_threads_and_loops(pool):
    results = []

    def work(start):
        async def run_all():
            return await asyncio.gather(*(pool.run(add, start + i) for i in range(30)))

        results.extend(asyncio.run(run_all()))

    threads = [threading.Thread(target=work, args=(i * 100,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(results) == sorted(i * 100 + j for i in range(3) for j in range(30))


def test_a_cancelled_call_is_dropped_from_the_queue():
    pool = ProcessPool(1, default_timeout_s=20.0)

    async def cancel_one(path):
        busy = asyncio.create_task(pool.run(time.sleep, 0.3))
        await asyncio.sleep(0.1)
        dropped = asyncio.create_task(pool.run(Path.touch, path))
        await asyncio.sleep(0.05)
        dropped.cancel()
        await busy
        return await pool.run(Path.exists, path)

    try:
        assert asyncio.run(cancel_one(Path(f"/tmp/nemo-rl-pool-{os.getpid()}"))) is False
    finally:
        pool.shutdown()


def test_what_cannot_be_sent_is_a_clear_error(pool):
    with pytest.raises(RewardError, match="add: its arguments cannot be sent to a worker process"):
        asyncio.run(pool.run(add, threading.Lock()))
    assert not pool.can_ship(threading.Lock().acquire)
    assert pool.can_ship(add)


def search_path():
    return sys.executable, sys.path


def test_workers_look_for_plugins_where_this_process_does(pool, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    assert asyncio.run(pool.run(search_path)) == (sys.executable, sys.path)


def test_a_plugin_that_changed_since_the_run_began_is_refused(monkeypatch, tmp_path):
    """As a package upgraded, or a working tree edited, under a run whose worker is started anew."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "scoring_plugin.py").write_text("def score(response):\n    return 1.0\n")
    score = importlib.import_module("scoring_plugin").score
    try:
        with closed_pool() as pool:
            assert asyncio.run(pool.run(score, "x")) == 1.0
            (tmp_path / "scoring_plugin.py").write_text("def score(response):\n    return 22.0\n")
            assert asyncio.run(pool.run(score, "x")) == 1.0  # this worker has it from before
        with closed_pool() as pool:
            for _ in range(2):  # it is not kept as if it had been loaded
                with pytest.raises(PluginIncompatible) as error:
                    asyncio.run(pool.run(score, "x"))
        head, row = str(error.value).splitlines()[1:3]
        assert head.split() == ["node", "plugin", "found", "expected"]
        assert "scoring_plugin (score)" in row and row.count("source ") == 2
    finally:
        del sys.modules["scoring_plugin"]


def test_a_module_that_workers_cannot_import_goes_by_value(pool, tmp_path):
    path = tmp_path / "loaded_from_file.py"
    path.write_text("BASE = 40\ndef score(x):\n    return helper(x)\ndef helper(x):\n    return BASE + x\n")
    spec = importlib.util.spec_from_file_location("loaded_from_file", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["loaded_from_file"] = module
    try:
        spec.loader.exec_module(module)
        assert asyncio.run(pool.run(module.score, 2)) == 42
    finally:
        del sys.modules["loaded_from_file"]


def test_large_arguments_and_results(pool):
    data = os.urandom(3_000_000)
    assert asyncio.run(pool.run(bytes.upper, data)) == data.upper()


def test_shutdown_fails_who_waits_and_refuses_later_calls():
    pool = ProcessPool(1, default_timeout_s=20.0)

    async def shut_down_meanwhile():
        waiting = [asyncio.create_task(pool.run(time.sleep, 30)) for _ in range(3)]
        await asyncio.sleep(0.3)
        pool.shutdown()
        return await asyncio.gather(*waiting, return_exceptions=True)

    errors = asyncio.run(shut_down_meanwhile())
    assert [type(e) for e in errors] == [WorkerDied] * 3
    with pytest.raises(WorkerDied, match="shut down"):
        asyncio.run(pool.run(add, 1))
    pool.shutdown()


def test_a_pool_that_nobody_holds_leaves_no_process_behind():
    pool = ProcessPool(1, default_timeout_s=20.0)
    pid = asyncio.run(pool.run(where))
    assert is_alive(pid)
    del pool
    assert wait_until(lambda: not is_alive(pid))


def run_script(source, tmp_path, **kwargs):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(source))
    return subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, **kwargs)


def test_functions_of_main_work_without_running_main_again(tmp_path):
    script = run_script(
        """
        import asyncio
        from nemo_rl_core.rollouts.scoring.process_pool import ProcessPool
        print("side effect")  # no `if __name__ == "__main__"` on purpose
        class Answer:
            def __init__(self, value): self.value = value
        def double(answer): return Answer(answer.value * 2)
        pool = ProcessPool(2, default_timeout_s=20)
        async def main(): return await asyncio.gather(*(pool.run(double, Answer(i)) for i in range(4)))
        print([answer.value for answer in asyncio.run(main())])
        """,
        tmp_path,
    )
    output, _ = script.communicate(timeout=60)
    assert output.splitlines() == ["side effect", "[0, 2, 4, 6]"]
    assert script.returncode == 0


def test_workers_die_with_a_parent_that_is_killed(tmp_path):
    script = run_script(
        """
        import asyncio, os
        from nemo_rl_core.rollouts.scoring.process_pool import ProcessPool
        pool = ProcessPool(1, default_timeout_s=60)
        def spin():
            while True: pass
        async def main():
            print(await pool.run(os.getpid), flush=True)
            await pool.run(spin)
        asyncio.run(main())
        """,
        tmp_path,
    )
    worker = int(script.stdout.readline())
    assert is_alive(worker)
    script.kill()
    script.wait(10)
    assert wait_until(lambda: not is_alive(worker))
    script.stdout.close()
