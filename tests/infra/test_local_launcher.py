"""Worker groups on this machine: in this process, and in processes that die, hang and raise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import cloudpickle
import pytest
import torch

from nemo_rl_core.errors import ConfigError, DeadlineExceeded, ResourceError, WorkerDied
from nemo_rl_core.infra.workers.local import LocalConfig, LocalLauncher
from nemo_rl_core.protocols.launcher import WorkerSpec
from nemo_rl_core.schema import ClusterConfig

cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Worker:
    """Defined in a module that a worker cannot import: it must travel by value."""

    def setup(self, config, context):
        self.context = context
        if config == "refuse" and context.rank == 1:
            raise ConfigError("this cannot be")

    def rank(self):
        return self.context.rank

    def start_child(self):
        return subprocess.Popen(["sleep", "60"]).pid

    def double(self, tensor, *, plus=0):
        return tensor * 2 + plus

    def threads(self):
        return torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS"), os.environ.get("EXTRA")

    def items(self, count):
        self.reached = 0
        for i in range(count):
            yield torch.full((3,), float(i))
            self.reached += 1

    def how_far(self):
        return self.reached

    def fail_on(self, ranks):
        if self.context.rank in ranks:
            raise ConfigError(f"wrong on {self.context.rank}")
        return "fine"

    def fail_while_others_wait(self):
        if self.context.rank == 1:
            raise ConfigError("wrong here")
        time.sleep(60)

    def raise_unpicklable(self):
        class Odd(Exception):
            def __reduce__(self):
                raise TypeError("no")

        raise Odd("strange")

    def die(self):
        if self.context.rank == 1:
            print("last words", file=sys.stderr, flush=True)
            os._exit(3)
        time.sleep(60)

    def killed(self):
        if self.context.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def hang(self):
        if self.context.rank == 1:
            time.sleep(60)

    def shutdown(self):
        pass


@pytest.fixture(scope="module")
def launcher():
    found = LocalLauncher(LocalConfig(failure_grace_s=0.5, start_timeout_s=60))
    found.setup(ClusterConfig(device="cpu", cpus_per_node=4))
    yield found
    found.shutdown()


def _spec(**kwargs):
    return WorkerSpec(role="policy", factory=Worker, config=None, **kwargs)


@pytest.fixture(scope="module")
def group(launcher):
    """A healthy group: tests that use it must leave it so."""
    found = launcher.launch(_spec(num_workers=2, env={"EXTRA": "here"}))
    yield found
    found.shutdown()


def test_a_group_may_ask_for_more_time_to_start_than_the_launcher_gives():
    hasty = LocalLauncher(LocalConfig(start_timeout_s=0.01))
    hasty.setup(ClusterConfig(device="cpu", cpus_per_node=4))
    try:
        with pytest.raises(DeadlineExceeded, match="deadline of 0.01 s"):
            hasty.launch(_spec(own_process=True))
        assert hasty.launch(_spec(own_process=True, start_timeout_s=60.0)).call("rank") == [0]
    finally:
        hasty.shutdown()


# -- one worker ------------------------------------------------------------------------------------------


def test_one_worker_lives_here_and_its_tensors_are_the_same(launcher):
    group = launcher.launch(_spec())
    assert group.size == 1 and isinstance(group.local, Worker)
    assert group.call("rank") == [0] and group.call_each("double", [(2,)]) == [4]
    assert [t[0].item() for t in group.iterate("items", 3)] == [0, 1, 2]
    group.shutdown()
    group.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        group.call("rank")


def test_launching_needs_setup_and_one_machine():
    with pytest.raises(RuntimeError, match="setup"):
        LocalLauncher().launch(_spec())
    with pytest.raises(ResourceError, match=r"num_nodes is 2"):
        LocalLauncher().setup(ClusterConfig(num_nodes=2))


# -- several -----------------------------------------------------------------------------------------------


def test_calls_reach_every_worker_in_rank_order(group):
    assert group.size == 2 and group.local is None
    assert group.call("rank", timeout_s=30) == [0, 1]
    found = group.call("double", torch.arange(3), plus=1, timeout_s=30)
    assert [t.tolist() for t in found] == [[1, 3, 5]] * 2
    assert [t.item() for t in group.call_each("double", [(torch.tensor(1),), (torch.tensor(5),)])] == [2, 10]
    with pytest.raises(ValueError, match="1 tuples of arguments for 2 policy workers"):
        group.call_each("double", [(1,)])


def test_cores_are_divided_and_the_environment_is_set(group):
    assert group.call("threads", timeout_s=30) == [(2, "2", "here")] * 2


def test_items_are_streamed_and_an_early_stop_lets_the_workers_finish(group):
    assert [t[0].item() for t in group.iterate("items", 4, timeout_s=30)] == [0, 1, 2, 3]
    stream = group.iterate("items", 5, timeout_s=30)
    assert next(stream)[0].item() == 0
    stream.close()
    assert group.call("how_far", timeout_s=30) == [5, 5]


def test_what_a_worker_raises_keeps_its_type_and_names_the_rank(group):
    with pytest.raises(ConfigError, match=r"\[policy rank 1\] wrong on 1") as caught:
        group.call("fail_on", (1,), timeout_s=30)
    assert str(caught.value).startswith("user code ") and ", training backend fail_on: [policy" in str(caught.value)
    assert "fail_on" in "".join(caught.value.__notes__)
    with pytest.raises(RuntimeError, match=r"\[policy rank 0\] Odd: strange"):
        group.call("raise_unpicklable", timeout_s=30)
    assert group.call("rank", timeout_s=30) == [0, 1]  # every worker answered, so the group goes on


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("die", WorkerDied, r"rank 1 exited with status 3 during die(.|\n)*last words"),
        ("killed", WorkerDied, r"rank 0 was ended by signal 9 \(out of memory\?\) during killed"),
        ("hang", DeadlineExceeded, r"hang .* deadline of 1 s; no answer from rank\(s\) 1 of 2"),
        ("fail_while_others_wait", ConfigError, r"\[policy rank 1\] wrong here"),
    ],
)
def test_a_group_that_cannot_go_on_is_ended_and_says_why(launcher, method, error, message):
    group = launcher.launch(_spec(num_workers=2))
    pids = group.pids
    children = group.call("start_child")
    group.call_timeout_s = 1 if method == "hang" else 30  # as by cluster.options: a call that sets none has one
    with pytest.raises(error, match=message):
        group.call(method)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    wait_for_end(children)  # such as an engine's own processes, which would keep the device's memory
    with pytest.raises(WorkerDied, match=f"workers are gone.*{method}"):
        group.call("rank")
    group.shutdown()


def test_a_setup_that_raises_ends_the_start(launcher):
    spec = WorkerSpec(role="critic", factory=Worker, config="refuse", num_workers=2)
    with pytest.raises(ConfigError, match=r"\[critic rank 1\] this cannot be"):
        launcher.launch(spec)


def test_workers_outlive_ctrl_c_and_die_with_their_driver_and_scripts_need_no_main_guard(tmp_path):
    """A terminal sends Ctrl-C to every process of the command; the driver saves with its workers' help."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, subprocess, sys, time
            from nemo_rl_core.schema.run import ClusterConfig
            from nemo_rl_core.infra.workers.local import LocalLauncher
            from nemo_rl_core.protocols.launcher import WorkerSpec

            class Worker:
                def setup(self, config, context): pass
                def pid(self): return os.getpid()
                def pids(self): return f"{os.getpid()} {subprocess.Popen(['sleep', '60']).pid}"

            launcher = LocalLauncher()
            launcher.setup(ClusterConfig(device="cpu", cpus_per_node=2))
            group = launcher.launch(WorkerSpec(role="policy", factory=Worker, config=None, num_workers=2))
            signal.signal(signal.SIGINT, lambda *_: print(*group.call("pid"), flush=True))
            print(*group.call("pids"), flush=True)
            time.sleep(60)
            """
        )
    )
    driver = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        pids = [int(word) for word in driver.stdout.readline().split()]
        assert len(pids) == 4
        os.killpg(driver.pid, signal.SIGINT)
        assert driver.stdout.readline()
        assert all(_runs(pid) for pid in pids)
    finally:
        driver.kill()
        driver.communicate(timeout=30)
    wait_for_end(pids)


def wait_for_end(pids):
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers, or what they had started, outlived their group or driver"
        time.sleep(0.05)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
