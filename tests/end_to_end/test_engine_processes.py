"""GRPO with its engine in a process of its own takes the very steps it takes with the engine in this process."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import ClassVar

import pytest
import torch

import nemo_rl
from nemo_rl_core.errors import ConfigError, MissingExtra, WorkerDied
from nemo_rl_core.schema import ClusterConfig, RunConfig
from nemo_rl_core.training.setup.engine import EnginePlacement, choose_weight_sync
from nemo_rl_plugins_dtensor.backend import DTensorBackend
from nemo_rl_plugins_torch_engine.backend import TorchEngine

pytestmark = pytest.mark.xdist_group("engine_processes")  # one worker makes what they share

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]


def reward(response: str) -> float:
    return float(any(c.isdigit() for c in response))


class KillsTheEngine(nemo_rl.Callback):
    """Ends the engine's process, as the kernel does when memory is short, at one event of the second step."""

    def __init__(self, event):
        self.event = event
        self.pids = []

    def on_step_start(self, run):
        self._kill("on_step_start", run)

    def on_refit(self, run, version):
        self._kill("on_refit", run)

    def on_batch(self, run, batch):
        self._kill("on_batch", run)

    def _kill(self, event, run):
        if event == self.event and run.step == 1:
            (engine,) = (p for p in multiprocessing.active_children() if p.name.startswith("nemo-rl-generation"))
            self.pids.append(engine.pid)
            os.kill(engine.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    def run(weight_sync="in_process", callbacks=(), policy=None, changes=None, **generation):
        torch.set_num_threads(1)
        config = {
            "model": "scratch:qwen2-tiny",
            "learning_rate": 1e-3,
            "num_prompts_per_step": 4,
            "num_generations_per_prompt": 4,
            "max_steps": 3,
            "run_dir": str(tmp_path_factory.mktemp("run")),
            "policy": {"max_sequence_length": 32, **(policy or {})},
            "generation": {"max_new_tokens": 4, **generation},
            **({} if weight_sync is None else {"weight_sync": weight_sync}),
            "logging": {"progress": "none"},
            "checkpointing": {"enabled": False},
            "cluster": {"device": "cpu", "cpus_per_node": 4},
            **(changes or {}),
        }
        history = nemo_rl.GRPOTrainer(config).fit(ROWS, reward, callbacks=list(callbacks)).history
        return [(entry["train/loss"], entry["train/grad_norm"], entry["reward/mean"]) for entry in history]

    return run


@pytest.fixture(scope="module")
def in_process(train):
    found = train()
    assert any(grad_norm > 0 for _, grad_norm, _ in found)
    return found


@pytest.mark.parametrize("weight_sync", ["shared_memory", "collective", "delta", "disk"])
def test_an_engine_in_its_own_process_trains_alike(train, in_process, weight_sync):
    assert train(weight_sync, num_workers=1) == in_process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weight_sync", "policy"),
    [
        ("shared_memory", {}),
        ("delta", {"backend": "megatron"}),
        ("collective", {"backend": "megatron", "tensor_parallel_size": 2}),
    ],
)
def test_two_trainers_refit_two_engines(train, in_process, weight_sync, policy):
    """Two ranks sum their gradients in another order, and groups are spread over two engines."""
    together = train(weight_sync, policy={"num_workers": 2, **policy}, num_workers=2)
    for mine, alone in zip(together, in_process, strict=True):
        assert mine == pytest.approx(alone, rel=1e-4, abs=1e-5)


def test_a_killed_engine_is_replaced_and_nothing_is_lost(train, in_process):
    """The trainer stands still while rollouts wait for the engine, so it is refitted at once."""
    killer = KillsTheEngine("on_refit")
    assert train("shared_memory", [killer], num_workers=1) == in_process
    assert len(killer.pids) == 1


@pytest.mark.parametrize("weight_updates", ["in_flight", "between"])
def test_an_engine_that_dies_beside_a_training_step_comes_back(train, weight_updates):
    """With updates between requests, those that it had are answered after the update, not before."""
    killer = KillsTheEngine("on_batch")
    stale = {"staleness": 1, "weight_updates": weight_updates, "generation_timeout_s": 20, "max_failed_fraction": 0}
    loss = {"name": "clipped_pg", "options": {"correction": "tis", "correction_max": 2.0}}
    changes = {"rollouts": stale, "loss": loss, "max_steps": 4}
    assert len(train("shared_memory", [killer], changes=changes, num_workers=1)) == 4
    assert len(killer.pids) == 1


@pytest.mark.parametrize("event", ["on_refit", "on_step_start"])
def test_an_engine_that_takes_turns_with_the_trainer_is_replaced(train, in_process, event):
    """Killed while it samples, the trainer comes back to refit it; killed asleep, it starts when that has left."""
    killer = KillsTheEngine(event)
    turns = {"cluster": {"device": "cpu", "cpus_per_node": 4, "offload": "always"}}
    assert train("shared_memory", [killer], changes=turns, num_workers=1) == in_process
    assert len(killer.pids) == 1


def test_a_killed_engine_that_may_not_be_replaced_ends_the_run_by_name(train):
    with pytest.raises(WorkerDied, match=r"engine generation is gone.*ended by signal 9"):
        train("shared_memory", [KillsTheEngine("on_step_start")], num_workers=1, max_restarts=0)


def test_no_weight_sync_named_takes_that_of_where_the_engine_lives(train, in_process):
    assert train(None, num_workers=1) == in_process


@pytest.mark.parametrize(
    ("num_workers", "cluster", "expected"),
    [
        (0, {}, "in_process"),
        (2, {}, "shared_memory"),  # on a GPU through CUDA IPC
        (2, {"colocated": False, "roles": {"policy": 2, "generation": 2}}, "collective"),
        (2, {"num_nodes": 2}, "collective"),
    ],
)
def test_the_default_sync_is_that_of_the_placement(num_workers, cluster, expected):
    placement = EnginePlacement(num_workers=num_workers, devices_per_worker=1, why="the test says so")
    assert choose_weight_sync(RunConfig(cluster=ClusterConfig(**cluster)), placement).name == expected


def test_a_sync_that_does_not_reach_the_engine_is_refused(train):
    with pytest.raises(ConfigError, match=r"in_process does not reach the engines.*Set weight_sync to one of: .*delta"):
        train("in_process", num_workers=1)


class NotInstalled(TorchEngine):
    """An engine that lacks what it runs on."""

    @staticmethod
    def check_installed(config):
        raise MissingExtra("install what the engine runs on")


def test_an_engine_that_is_not_installed_is_told_before_a_model_is_loaded(train, monkeypatch):
    monkeypatch.setattr(DTensorBackend, "setup", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(MissingExtra, match="install what the engine runs on"):
        train(backend=NotInstalled)


class Neighbour(TorchEngine):
    """Notes whether a trainer shares its device."""

    seen: ClassVar[list[bool]] = []

    def setup(self, config, context):
        self.seen.append(context.shares_device)
        super().setup(config, context)


def test_an_engine_is_told_that_the_trainer_shares_its_device(train, in_process):
    assert train(backend=Neighbour) == in_process
    assert Neighbour.seen == [True]
