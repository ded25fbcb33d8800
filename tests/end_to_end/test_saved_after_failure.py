"""A run that stops on a failure saves its last whole step, says where, and goes on from it with nothing lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import pytest

import nemo_rl
from nemo_rl_core.errors import EnvironmentFailure, WorkerDied
from nemo_rl_core.planning.simulation import SimulatedCluster, SimulatedRun
from nemo_rl_core.planning.simulation.parts import SimulatedPolicy
from nemo_rl_core.records.jsonl import read_groups
from nemo_rl_core.registry import RunHooks
from nemo_rl_core.training.checkpoints import saver as saving
from nemo_rl_core.training.reporting.record import read_metrics

pytestmark = pytest.mark.xdist_group("saved_after_failure")
STALE = {
    "loss": {"name": "clipped_pg", "options": {"correction": "tis", "correction_max": 2.0}},
    "rollouts": {"staleness": 1},
}


class FailsAt(nemo_rl.Callback):
    """Raises at one event of one step, as a bug of a plugin would."""

    critical = True

    def __init__(self, event, step):
        self.event, self.step = event, step
        self.told = None

    def _at(self, event, run):
        if event == self.event and run.step == self.step:
            raise ValueError(f"broken in {event}")

    def on_rollouts(self, run, groups):
        self._at("on_rollouts", run)

    def on_train_step(self, run, metrics):
        self._at("on_train_step", run)

    def on_validation(self, run, metrics):
        self._at("on_validation", run)

    def on_error(self, run, error):
        self.told = str(error)


def reward(response):
    return float(any(c.isdigit() for c in response))


def steps_of(run_dir):
    names = ("train/loss", "train/grad_norm", "reward/mean", "validation/accuracy")
    return [{name: metrics.get(name) for name in names} for metrics in read_metrics(run_dir)]


@pytest.fixture
def run(tiny, tmp_path, rows):
    def start(folder, *callbacks, **changes):
        config = tiny(run_dir=str(tmp_path / folder), **{"max_steps": 4, **changes})
        trainer = nemo_rl.GRPOTrainer(config)
        return trainer.fit(rows, reward, validation_dataset=rows[:4], callbacks=list(callbacks))

    return start


@pytest.mark.parametrize("event", ["on_rollouts", "on_validation"])
def test_the_last_whole_step_is_saved_and_the_run_goes_on_bit_for_bit(run, tmp_path, event):
    """In the middle of a step, and between two: a validation that failed is made up for."""
    validation = {"every": 3, "max_samples": 4}
    whole = run("whole", validation=validation)
    breaker = FailsAt(event, 3)
    with pytest.raises(ValueError, match=r"(?s)broken in .*Step 3 is saved in .*step_3; the same command goes on"):
        run("broken", breaker, validation=validation)
    assert "Step 3 is saved" in breaker.told
    assert [path.name for path in (tmp_path / "broken/checkpoints").iterdir()] == ["step_3"]
    again = run("broken", validation=validation)
    assert steps_of(tmp_path / "broken") == steps_of(tmp_path / "whole")
    assert (again.model_path / "model.safetensors").read_bytes() == (
        whole.model_path / "model.safetensors"
    ).read_bytes()


def test_asynchronous_rollouts_are_saved_too(run, tmp_path):
    rest = {**STALE, "max_steps": 5, "checkpointing": {"export_model": False}}
    with pytest.raises(ValueError, match="Step 2 is saved"):
        run("broken", FailsAt("on_rollouts", 2), **rest)
    run("broken", **rest)
    files = [tmp_path / f"broken/rollouts/step_{step}.jsonl" for step in range(1, 6)]
    ids = [group.group_id for path in files for group in read_groups(path)]
    assert sorted(ids) == list(range(20))  # of each prompt one group, in order or not


def test_weights_that_a_step_was_changing_are_not_saved(run, tmp_path):
    rest = {"checkpointing": {"every": 2}}
    with pytest.raises(ValueError, match=r"Step 2 is saved in .*step_2 \(nothing later: the models were changing\)"):
        run("broken", FailsAt("on_train_step", 3), **rest)
    assert [path.name for path in (tmp_path / "broken/checkpoints").iterdir()] == ["step_2"]


def test_a_failure_before_the_first_step_saves_nothing_and_says_nothing(run, tmp_path):
    with pytest.raises(ValueError, match="broken in on_rollouts") as raised:
        run("broken", FailsAt("on_rollouts", 0))
    assert "is saved" not in str(raised.value)
    assert not (tmp_path / "broken/checkpoints").exists()


def test_trainers_that_are_dead_do_not_hide_what_killed_them(tiny, rows, caplog):
    class Kills(nemo_rl.Callback):
        def on_step_start(self, run):
            if run.step == 1:
                victim = next(p for p in multiprocessing.active_children() if p.name == "nemo-rl-policy-1")
                os.kill(victim.pid, signal.SIGKILL)

    config = tiny(policy={"num_workers": 2}, cluster={"device": "cpu", "cpus_per_node": 2})
    with pytest.raises(WorkerDied, match=r"(?s)rank 1 was ended by signal 9.*Nothing is saved of its 1 steps"):
        nemo_rl.GRPOTrainer(config).fit(rows, reward, callbacks=[Kills()])
    assert "Step 1 could not be saved: The policy workers are gone" in caplog.text


def test_a_trainer_that_hangs_does_not_hold_the_error_back(tmp_path, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(saving, "_RESCUE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(SimulatedPolicy, "save", lambda self, path: never.wait(60))

    class Fails:
        critical = True

        def on_rollouts(self, run, groups):
            if run.step == 2:
                raise EnvironmentFailure("the environment is broken")

    try:
        with pytest.raises(EnvironmentFailure, match=r"environment is broken\nNothing is saved of its 2 steps"):
            SimulatedRun.build(
                SimulatedCluster(num_steps=3), 0, folder=tmp_path, hooks=RunHooks([Fails()], installed=False)
            ).run()
    finally:
        never.set()
