"""A run killed at any moment and resumed equals one that was never interrupted, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nemo_rl_core.training.reporting.record import read_metrics

pytestmark = pytest.mark.xdist_group("resume")  # one worker makes what they share

SCRIPT = textwrap.dedent(
    """
    import json, os, signal, sys
    import torch
    torch.set_num_threads(1)
    import nemo_rl

    ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "response": str(a + b)} for a in range(5) for b in range(5)]

    def reward(response):
        return float(any(c.isdigit() for c in response))

    class Kill(nemo_rl.Callback):
        critical = True
        def __init__(self, moment, step):
            self.moment, self.step = moment, step
        def at(self, moment, run):
            if self.moment == moment and run.step == self.step:
                os.kill(os.getpid(), signal.SIGKILL)
        def on_step_start(self, run): self.at("step_start", run)
        def on_rollouts(self, run): self.at("rollouts", run)
        def on_batch(self, run): self.at("batch", run)
        def on_train_step(self, run): self.at("train_step", run)

    def main():
        algorithm, run_dir, moment, step = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
        common = {"model": "scratch:qwen2-tiny", "learning_rate": 1e-3, "max_steps": 6, "run_dir": run_dir,
                  "policy": {"max_sequence_length": 32}, "logging": {"progress": "none"},
                  "checkpointing": {"every": 2}}
        callbacks = [] if moment == "never" else [Kill(moment, step)]
        if algorithm == "grpo":
            trainer = nemo_rl.GRPOTrainer({**common, "num_prompts_per_step": 4, "num_generations_per_prompt": 4,
                                           "generation": {"max_new_tokens": 4}})
            trainer.fit(ROWS, reward, callbacks=callbacks)
        else:
            trainer = nemo_rl.SFTTrainer({**common, "batch_size": 8})
            trainer.fit(ROWS, callbacks=callbacks)

    if __name__ == "__main__":
        main()
    """
)


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("script") / "run.py"
    path.write_text(SCRIPT)
    return path


def run(script: Path, *arguments: object) -> int:
    return subprocess.run([sys.executable, str(script), *map(str, arguments)], check=False, timeout=100).returncode


def weights(run_dir: Path) -> bytes:
    return (run_dir / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(script, tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for algorithm in ("grpo", "sft"):
        folders[algorithm] = tmp_path_factory.mktemp(algorithm)
        assert run(script, algorithm, folders[algorithm], "never", 0) == 0
    return folders


@pytest.mark.parametrize(
    ("algorithm", "moment", "step"),
    [
        ("grpo", "rollouts", 3),
        ("grpo", "train_step", 4),
        ("grpo", "batch", 5),
        ("sft", "batch", 3),
        ("sft", "train_step", 5),
    ],
)
def test_killed_in_the_middle_of_a_step(script, uninterrupted, tmp_path, algorithm, moment, step):
    assert run(script, algorithm, tmp_path, moment, step) == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    assert run(script, algorithm, tmp_path, "never", 0) == 0
    assert weights(tmp_path) == weights(uninterrupted[algorithm])
    names = ("train/loss", "train/grad_norm") + (("reward/mean",) if algorithm == "grpo" else ())
    for mine, other in zip(read_metrics(tmp_path), read_metrics(uninterrupted[algorithm]), strict=True):
        assert {n: mine[n] for n in names} == {n: other[n] for n in names}


CONFIG = """
algorithm: grpo
model: scratch:qwen2-tiny
num_prompts_per_step: 4
num_generations_per_prompt: 4
max_steps: 100000
policy: {max_sequence_length: 32}
generation: {max_new_tokens: 4}
data:
  train: {source: rows.jsonl}
reward: rewards:digits
"""


def test_ctrl_c_saves_leaves_with_130_and_the_same_command_goes_on(tmp_path):
    """Sent to every process of the command, as a terminal does."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "rewards.py").write_text(
        "def digits(response):\n    return float(any(c.isdigit() for c in response))\n"
    )
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "nemo_rl_core.cli", "train", "config.yaml", "--run-dir", "run", "--json"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 90
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "step" and event["step"] >= 2:
                os.killpg(process.pid, signal.SIGINT)
                break
            assert time.monotonic() < deadline
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "run the same command to continue" in stderr
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(saved) == 1
    step = int(saved[0].name.removeprefix("step_"))
    again = subprocess.run(
        [*command, f"max_steps={step + 2}"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=90
    )
    assert again.returncode == 0, again.stderr
    events = [json.loads(line) for line in again.stdout.splitlines()]
    assert [e["step"] for e in events if e["event"] == "step"] == [step + 1, step + 2]


def test_a_full_disk_while_saving_keeps_what_was_saved(script, tmp_path):
    assert run(script, "sft", tmp_path, "train_step", 2) == -signal.SIGKILL  # leaves the checkpoint of step 2
    limited = textwrap.dedent(
        """
        import resource, runpy, signal, sys
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, str(script), "sft", str(tmp_path), "never", "0"],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode != 0
    assert "CheckpointError: Could not save the checkpoint of step 4" in done.stderr
    assert "step_2, is untouched" in done.stderr
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_2"]
