"""Workers are forked from a process that has imported torch where that is the same as a new process, else spawned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from nemo_rl_core.infra.workers import forking
from nemo_rl_core.infra.workers.local import LocalConfig, LocalLauncher
from nemo_rl_core.protocols.launcher import WorkerSpec
from nemo_rl_core.schema import ClusterConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are spawned there")


class Tells:
    """A worker that imports nothing itself and tells of its process."""

    config_class = dict
    capabilities: frozenset[str] = frozenset()

    def setup(self, config, context) -> None:
        self.rank = context.rank

    def has_imported(self, module: str) -> bool:
        return module in sys.modules

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def folder(self) -> str:
        return os.getcwd()

    def num_threads(self) -> int:
        import torch

        return torch.get_num_threads()

    def threads(self) -> int:
        return len(os.listdir("/proc/self/task"))

    def parent(self) -> int:
        return os.getppid()

    def shutdown(self) -> None:
        pass


@pytest.fixture
def launch():
    launchers = []

    def launch(**changes):
        made = LocalLauncher(LocalConfig(start_timeout_s=120.0, failure_grace_s=5.0))
        launchers.append(made)
        made.setup(ClusterConfig(device="cpu", cpus_per_node=2))
        return made.launch(WorkerSpec(role="policy", factory=Tells, config=None, num_workers=2, **changes))

    yield launch
    for made in launchers:
        made.shutdown()


def test_a_worker_is_a_fork_of_one_process_that_has_imported_torch(launch):
    first, second = launch(), launch()
    assert first.call("has_imported", "transformers.modeling_utils") == [True, True]
    parents = {*first.call("parent"), *second.call("parent")}
    assert len(parents) == 1 and os.getpid() not in parents
    assert len(os.listdir(f"/proc/{parents.pop()}/task")) == 1, "a process with threads is not safe to fork"


def test_it_has_the_environment_and_the_folder_of_the_driver_as_they_are_now(launch, monkeypatch, tmp_path):
    launch()
    monkeypatch.setenv("FX_SETTING", "new")
    monkeypatch.delenv("FX_OLD", raising=False)
    monkeypatch.chdir(tmp_path)
    group = launch(env={"FX_ROLE": "policy"})
    assert group.call("has_imported", "transformers.modeling_utils") == [True, True]
    assert group.call("variable", "FX_SETTING") == ["new", "new"]
    assert group.call("variable", "FX_ROLE") == ["policy", "policy"]
    assert group.call("variable", "RANK") == ["0", "1"]
    assert group.call("folder") == [str(tmp_path)] * 2


@pytest.mark.parametrize(
    "name", ["TORCH_LOGS_OUT", "HF_HOME", "NCCL_DEBUG", "OMP_PROC_BIND", "PYTHONHASHSEED", "TMPDIR"]
)
def test_it_is_spawned_where_the_libraries_have_read_another_environment(launch, monkeypatch, tmp_path, name):
    launch()
    monkeypatch.setenv(name, str(tmp_path) if name in ("TMPDIR", "HF_HOME") else "1")
    group = launch()
    assert group.call("has_imported", "transformers.modeling_utils") == [False, False]
    assert group.call("variable", name) == [os.environ[name]] * 2


def test_it_is_spawned_on_another_device_and_when_asked_for(launch, monkeypatch):
    assert forking.start_context("cuda:0", {}, threads_given=True).get_start_method() == "spawn"
    monkeypatch.setenv(forking.START_VARIABLE, "spawn")
    assert launch().call("has_imported", "transformers.modeling_utils") == [False, False]


def test_it_has_the_threads_that_the_launcher_gives(launch):
    assert launch().call("num_threads") == [1, 1]


def test_all_end_when_the_driver_is_killed(tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys
            from tests.infra.test_forking import Tells
            from nemo_rl_core.infra.workers.local import LocalConfig, LocalLauncher
            from nemo_rl_core.protocols.launcher import WorkerSpec
            from nemo_rl_core.schema import ClusterConfig

            made = LocalLauncher(LocalConfig(start_timeout_s=120.0, failure_grace_s=5.0))
            made.setup(ClusterConfig(device="cpu", cpus_per_node=2))
            group = made.launch(WorkerSpec(role="policy", factory=Tells, config=None, num_workers=2))
            print(*group.pids, *set(group.call("parent")), flush=True)
            sys.stdin.read()
            """
        )
    )
    root = str(forking.__file__).partition("/nemo_rl_core/")[0]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": root}, **pipes) as driver:
        others = [int(pid) for pid in driver.stdout.readline().split()]
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert driver.stdout.read() == b""  # all that held it have ended, or closed it
    assert len(others) == 3
    for pid in others:
        wait_for_end(pid)


def wait_for_end(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    import select

    assert select.select([descriptor], [], [], 60.0)[0], f"{pid} goes on"
    os.close(descriptor)
