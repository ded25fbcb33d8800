"""Whole runs: the same configuration here and in Ray actors, and what happens when one of these is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cloudpickle
import pytest
import torch
from safetensors.torch import load_file

from nemo_rl_core import models
from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.errors import WorkerDied
from nemo_rl_core.protocols.loss import LossSums
from nemo_rl_core.training.run import run as run_config
from nemo_rl_core.training.setup.parts import RunInputs
from nemo_rl_plugins_ray.launcher import RayLauncher

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow, pytest.mark.timeout(600)]
cloudpickle.register_pickle_by_value(sys.modules[__name__])
ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]


def reward(response: str) -> float:
    return float(any(c.isdigit() for c in response))


class PolicyGradient:
    """A user's loss, which reaches the workers by value. It kills rank 1 in mid-step where a file asks for it."""

    denominator = "tokens"
    needs = frozenset({"logprobs"})

    def __init__(self, bomb: str) -> None:
        self.bomb = bomb

    def __call__(self, outputs, batch):
        if os.path.exists(self.bomb) and os.environ.get("RANK") == "1":
            os.unlink(self.bomb)
            os.kill(os.getpid(), signal.SIGKILL)
        mask = batch["loss_mask"]
        return LossSums(-(outputs.logprobs * batch["advantages"]).masked_fill(~mask, 0.0).sum())


class PlantBomb:
    """Callback: in the second step rank 1 is to die."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_batch(self, run, batch):
        if run.step == 1:
            self.path.touch()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(connected, tmp_path_factory):
    bomb = tmp_path_factory.mktemp("bomb") / "here"

    def go(*callbacks, run_dir=None, cluster=None, model="scratch:qwen2-1m", **policy):
        config = {
            "algorithm": "grpo",
            "model": model,
            "learning_rate": 1e-4,
            "num_prompts_per_step": 4,
            "num_generations_per_prompt": 4,
            "max_steps": 3,
            "run_dir": str(run_dir or tmp_path_factory.mktemp("run")),
            "policy": {"max_sequence_length": 32, **policy},
            "loss": {"name": lambda config=None: PolicyGradient(str(bomb))},
            "generation": {"max_new_tokens": 4},
            "logging": {"progress": "none"},
            "checkpointing": {"every": 1},
            "cluster": {"device": "cpu", "cpus_per_node": 4, **(cluster or {})},
        }
        inputs = RunInputs(train_rows=ROWS, reward=reward)
        return run_config(finalize(load_config(config)), inputs, callbacks)

    go.bomb = bomb
    return go


@pytest.fixture(scope="module")
def alone(run):
    """One process, the local launcher; the configuration names no weight sync, as those under Ray."""
    return run()


def weights(result):
    return load_file(next(Path(result.model_path).glob("*.safetensors")))


def assert_same_run(found, expected):
    assert [e["step"] for e in found.history] == [e["step"] for e in expected.history] == [1, 2, 3]
    for mine, other in zip(found.history, expected.history, strict=True):
        for name in ("train/loss", "train/grad_norm", "reward/mean"):
            assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)


def test_tensor_parallel_actors_and_engines_of_their_own_devices_take_the_same_steps(run, alone):
    blocks = {}

    class Launcher(RayLauncher):
        def launch(self, spec):
            blocks[spec.role] = spec.block
            return super().launch(spec)

    cluster = {"launcher": Launcher, "colocated": False, "roles": {"policy": 2, "generation": 2}}
    assert alone.history[-1]["train/grad_norm"] > 0
    assert_same_run(run(cluster=cluster, num_workers=2, tensor_parallel_size=2), alone)
    assert blocks == {"policy": 2, "generation": 1}, "tensor-parallel peers are to share a machine"


def test_a_worker_killed_in_mid_step_ends_the_run_with_its_name_and_nothing_is_lost(run, alone, tmp_path, monkeypatch):
    """Two data-parallel actors; resumed after the kill, the run ends where the uninterrupted one does.

    The paths are relative to the driver's working directory, which is not that of the cluster.
    """
    monkeypatch.chdir(tmp_path)
    shutil.copytree(Path(models.__file__).parent / "scratch/qwen2-1m", "shape")
    places = {"run_dir": "run", "model": "scratch:shape"}
    cluster = {"launcher": "ray", "options": {"failure_grace_s": 2.0}}
    host = os.uname().nodename
    with pytest.raises(WorkerDied, match=rf"policy worker of rank 1 on {host} was ended by signal 9 .*train_step"):
        run(PlantBomb(run.bomb), **places, cluster=cluster, num_workers=2)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir() if path.is_dir()) == ["step_1"]
    resumed = run(**places, cluster=cluster, num_workers=2)
    assert_same_run(resumed, alone)


# -- a cluster of the run's own, through the command line ------------------------------------------------------


@pytest.fixture
def folder():
    """A short path: Ray keeps its sockets below the temporary folder."""
    with tempfile.TemporaryDirectory(prefix="nr", dir="/tmp") as found:
        yield Path(found)


def start(folder, *arguments):
    reward_file = folder / "rewards.py"
    reward_file.write_text("def digits(response):\n    return float(any(c.isdigit() for c in response))\n")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = {
        "algorithm": "grpo",
        "model": "scratch:qwen2-tiny",
        "max_steps": 500,
        "num_prompts_per_step": 2,
        "num_generations_per_prompt": 2,
        "run_dir": str(folder / "run"),
        "policy": {"max_sequence_length": 32},
        "generation": {"max_new_tokens": 4},
        "reward": "rewards:digits",
        "data": {"train": {"source": str(folder / "rows.jsonl")}},
        "cluster": {"device": "cpu", "cpus_per_node": 1, "options": {"object_store_gib": 0.1}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tmp").mkdir()
    command = [sys.executable, "-m", "nemo_rl_core.cli", "train", str(folder / "config.json"), "--cluster", "ray"]
    env = {**os.environ, "PYTHONPATH": str(folder), "TMPDIR": str(folder / "tmp")}
    env.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [*command, *arguments],
        env=env,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def processes_of(folder):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"{folder}/tmp" in command:
            found.append(command[:80])
    return found


def test_ctrl_c_saves_and_leaves_neither_processes_nor_files(folder):
    process = start(folder, "--json")
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        assert processes_of(folder), "its own Ray runs below the temporary folder"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert [json.loads(line) for line in (*lines, *out.splitlines()) if line.strip()]  # all of it is JSON
    assert "nemo-rl-ray" not in err and "Token authentication" not in err and "raylet" not in err
    assert list((folder / "run" / "checkpoints").glob("step_*"))
    assert not list((folder / "tmp").glob("nemo-ray-*"))
    deadline = time.monotonic() + 20
    while left := processes_of(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_several_machines_without_a_cluster_are_refused(folder):
    process = start(folder, "cluster.num_nodes=2")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 6, err
    assert "no Ray cluster is given" in err and "RAY_ADDRESS" in err and "Traceback" not in err
