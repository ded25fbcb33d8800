"""Asynchronous runs: within the bound, nothing lost, and with a bound of 0 the synchronous run bit for bit."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from typing import ClassVar

import pytest

import nemo_rl
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.infra.weights.fingerprint import fingerprint
from nemo_rl_core.records.jsonl import read_groups
from nemo_rl_core.training.reporting.record import read_metrics
from nemo_rl_core.training.setup.assemble import assemble
from nemo_rl_core.training.setup.parts import RunInputs
from nemo_rl_plugins_torch_engine.backend import TorchEngine

pytestmark = pytest.mark.xdist_group("async")
CORRECTED = {"name": "clipped_pg", "options": {"correction": "tis", "correction_max": 2.0}}


def digits(response):
    return float(any(c.isdigit() for c in response))


def weights_of(parts):
    return fingerprint(parts.policy.group.iterate("export_weights", timeout_s=60.0))


def synchronous_by_hand(trainer, rows):
    """Sample, then train, and nothing else: no buffer, no pump, no loop."""
    config = trainer.config
    parts = assemble(config, RunInputs(train_rows=rows, reward=digits), run_dir=config.run_dir)
    try:
        losses = []
        for version in range(config.max_steps):
            parts.weight_sync.sync(
                parts.policy.group, parts.generation, version=version, share=parts.share_weights, timeout_s=60.0
            )
            items = parts.data.next(config.num_items_per_step)
            with parts.runner.gathering():
                futures = [
                    parts.runner.submit(
                        item.index, item.task_id, item.task, group_size=config.group_size, weight_version=version
                    )
                    for item in items
                ]
            batch = parts.algorithm.build_batch([future.result(60) for future in futures])
            parts.algorithm.fill_batch(batch, parts.models)
            parts.algorithm.finish_batch(batch)
            for update in parts.algorithm.updates(batch):
                losses.append(parts.policy.train_step(batch.select(list(update.indices)), update.loss)["loss"])
        return losses, weights_of(parts)
    finally:
        parts.close()


def test_a_bound_of_0_is_the_synchronous_run_bit_for_bit(tiny, rows):
    config = tiny(max_steps=4, rollouts={"staleness": 0})
    losses, expected = synchronous_by_hand(nemo_rl.GRPOTrainer(config), rows)
    found = []

    class Weights(nemo_rl.Callback):
        critical = True

        def on_refit(self, run, version):
            found.append(version)

    result = nemo_rl.GRPOTrainer(config).fit(rows, digits, callbacks=[Weights()])
    assert [m["train/loss"] for m in result.history] == losses
    assert found == [0, 1, 2, 3]
    exported = assemble(
        nemo_rl.GRPOTrainer(tiny(model=str(result.model_path))).config,
        RunInputs(train_rows=rows, reward=digits),
        run_dir=config["run_dir"],
    )
    try:
        assert weights_of(exported) == expected
    finally:
        exported.close()


def trained_groups(run_dir, steps):
    return [[g.group_id for g in read_groups(run_dir / "rollouts" / f"step_{n}.jsonl")] for n in range(1, steps + 1)]


class WithoutInFlight(TorchEngine):
    """An engine that must be empty when its weights change."""

    capabilities: ClassVar[frozenset[str]] = TorchEngine.capabilities - {"in_flight_updates"}

    def update_weights(self, version, tensors, *, share=False):
        assert self._scheduler.idle, "weights came while requests were in flight"
        super().update_weights(version, tensors, share=share)


@pytest.mark.parametrize(
    ("rollouts", "backend"),
    [
        ({"staleness": 1}, TorchEngine),
        ({"staleness": 2, "order": "ready_first", "max_in_flight": 8}, TorchEngine),
        ({"staleness": 2, "order": "ready_first", "too_old": "drop"}, WithoutInFlight),
        ({"staleness": 1, "weight_updates": "between"}, TorchEngine),
    ],
    ids=["data-order", "ready-first", "engine-without-in-flight", "between"],
)
def test_no_token_is_older_than_the_bound_and_no_group_comes_twice(tiny, rows, rollouts, backend):
    config = tiny(
        max_steps=6,
        policy={"max_sequence_length": 64},
        generation={"max_new_tokens": 40, "backend": backend},
        rollouts=rollouts,
        loss=CORRECTED,
    )
    result = nemo_rl.GRPOTrainer(config).fit(rows, digits)
    steps = trained_groups(result.run_dir, 6)
    flat = [group_id for step in steps for group_id in step]
    assert len(flat) == len(set(flat)) == 24
    if rollouts.get("too_old") != "drop":
        assert sorted(flat) == list(range(24))  # none is left out, and none is sampled for a seventh step
    ages = [m["async/age_max"] for m in result.history]
    assert ages[0] == 0 and max(ages) <= rollouts["staleness"] and max(ages) > 0
    for number in range(1, 7):
        for group in read_groups(result.run_dir / "rollouts" / f"step_{number}.jsonl"):
            turns = [t for r in group.valid for s in r.segments for t in s if t.sampled]
            assert all(number - 1 - t.weight_version <= rollouts["staleness"] for t in turns)
            if backend is WithoutInFlight or rollouts.get("weight_updates") == "between":
                assert all(t.weight_version == t.last_weight_version for t in turns)
    assert result.history[-1]["async/in_flight_groups"] == 0


SCRIPT = textwrap.dedent(
    """
    import os, signal, sys
    import torch
    torch.set_num_threads(1)
    import nemo_rl

    ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(5)]

    class Kill(nemo_rl.Callback):
        critical = True
        def on_train_step(self, run, metrics):
            if run.step == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)

    if __name__ == "__main__":
        config = {"model": "scratch:qwen2-tiny", "max_steps": 8, "num_prompts_per_step": 4,
                  "num_generations_per_prompt": 2, "run_dir": sys.argv[1], "policy": {"max_sequence_length": 32},
                  "generation": {"max_new_tokens": 8}, "logging": {"progress": "none"}, "checkpointing": {"every": 2},
                  "rollouts": {"staleness": 2, "order": "ready_first"},
                  "loss": {"name": "clipped_pg", "options": {"correction": "tis", "correction_max": 2.0}}}
        nemo_rl.GRPOTrainer(config).fit(ROWS, lambda response: float(len(response)), callbacks=[Kill()])
    """
)


def test_a_killed_run_goes_on_with_nothing_lost_or_doubled(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    folder = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, str(script), str(folder), "5"], check=False, timeout=100, env=environment)
    assert killed.returncode == -signal.SIGKILL
    done = subprocess.run([sys.executable, str(script), str(folder), "-1"], check=False, timeout=100, env=environment)
    assert done.returncode == 0
    flat = [group_id for step in trained_groups(folder, 8) for group_id in step]
    assert sorted(flat) == list(range(32))
    metrics = read_metrics(folder)
    assert [m["step"] for m in metrics] == list(range(1, 9))
    assert max(m["async/age_max"] for m in metrics) <= 2
    assert sum(m["async/dropped_groups"] + m["async/resampled_groups"] for m in metrics) == 0


@pytest.mark.parametrize("loss", ["clipped_pg", "cispo"])
def test_stale_rollouts_without_a_correction_are_refused_with_the_fix(tiny, loss):
    with pytest.raises(ConfigError) as caught:
        nemo_rl.GRPOTrainer(tiny(rollouts={"staleness": 1}, loss={"name": loss}))
    for word in ("loss.options.correction", "tis", "correction_max", "icepop", "seq_mask_tis", "ratio_against"):
        assert word in str(caught.value)


class PlainLoss:
    """Of a stranger, without a word on importance."""

    denominator = "tokens"
    needs = frozenset({"logprobs"})
    config_class = dict

    def __init__(self, config=None):
        pass

    def __call__(self, outputs, batch):
        raise AssertionError("not called")


class CorrectedLoss(PlainLoss):
    corrects_importance = True


def test_a_strangers_loss_must_say_that_it_corrects(tiny, rows):
    config = tiny(rollouts={"staleness": 1}, loss={"name": PlainLoss})
    with pytest.raises(ConfigError, match=r"takes_stale_rollouts.*tis.*icepop.*staleness=0"):
        nemo_rl.GRPOTrainer(config).fit(rows, digits)
    trainer = nemo_rl.GRPOTrainer(tiny(rollouts={"staleness": 1}, loss={"name": CorrectedLoss}))
    parts = assemble(trainer.config, RunInputs(train_rows=rows, reward=digits), run_dir=trainer.config.run_dir)
    assert parts.in_flight_updates and not parts.share_weights
    parts.close()


def test_an_engine_that_cannot_is_not_asked_for_updates_in_flight(tiny, rows):
    config = tiny(
        rollouts={"staleness": 1, "weight_updates": "in_flight"},
        generation={"max_new_tokens": 4, "backend": WithoutInFlight},
        loss=CORRECTED,
    )
    with pytest.raises(ConfigError, match=r"WithoutInFlight cannot take new weights while it samples.*between"):
        nemo_rl.GRPOTrainer(config).fit(rows, digits)


class IsToldToStop(TorchEngine):
    """Ctrl-C comes while it samples greedily, which only validation does here, and it never answers."""

    async def generate(self, request):
        if request.sampling.temperature == 0:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(3600)
        return await super().generate(request)


def test_a_validation_is_cut_off_by_ctrl_c_and_its_step_is_kept(tiny, rows):
    config = tiny(
        validation={"every": 2, "at_start": False, "at_end": False, "temperature": 0.0, "max_samples": 1},
        generation={"max_new_tokens": 4, "backend": IsToldToStop},
        rollouts={"staleness": 1, "generation_timeout_s": 60},
        loss=CORRECTED,
    )
    result = nemo_rl.GRPOTrainer(config).fit(rows, digits, validation_dataset=rows[:2])
    assert (result.status, result.step) == ("interrupted", 2) and result.checkpoint is not None
    assert [m["step"] for m in read_metrics(result.run_dir)] == [1, 2]


def test_what_everyone_waited_for_is_in_the_metrics(tiny, rows):
    result = nemo_rl.GRPOTrainer(tiny(max_steps=2)).fit(rows, digits)
    for metrics in read_metrics(result.run_dir):
        found = {name.removeprefix("async/"): value for name, value in metrics.items() if name.startswith("async/")}
        assert found["age_mean"] == found["age_max"] == found["carried_over_fraction"] == 0
        assert found["buffer_groups"] == found["in_flight_groups"] == 0
        assert found["trainer_idle_s"] > 0 and 0 < found["trainer_idle_fraction"] < 1
        assert found["engine_idle_s"] > 0 and 0 < found["engine_idle_fraction"] < 1
    assert json.dumps(found)
