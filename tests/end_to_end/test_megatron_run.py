"""GRPO with the policy on megatron-core: it learns, agrees with the engine, and resumes."""

from __future__ import annotations

import pytest

import nemo_rl
from nemo_rl_plugins_megatron.backend import MegatronBackend


def a_digit(response: str) -> float:
    """A reward that a random model already earns now and then."""
    return float(any(c.isdigit() for c in response))


@pytest.fixture
def on_megatron(tiny):
    def make(**changes):
        config = tiny(**changes)
        config["policy"]["backend"] = "megatron"
        config["generation"]["backend"] = "torch_engine"
        return config

    return make


def test_the_reward_rises_and_engine_and_trainer_agree(on_megatron, rows):
    config = on_megatron(max_steps=20, num_prompts_per_step=8, num_generations_per_prompt=8, learning_rate=3e-3)
    result = nemo_rl.GRPOTrainer(config).fit(rows, a_digit)
    rewards = [entry["reward/mean"] for entry in result.history]
    assert result.status == "completed"
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    for entry in result.history:
        assert entry["train/probs_ratio"] == pytest.approx(1.0, abs=1e-6)
        assert entry["train/token_mult_prob_error"] == pytest.approx(1.0, abs=1e-4)
    assert (result.model_path / "model.safetensors").is_file()


def test_a_resumed_run_equals_an_uninterrupted_one(on_megatron, rows, tmp_path, monkeypatch):
    loaded = []
    load = MegatronBackend.load_checkpoint
    monkeypatch.setattr(MegatronBackend, "load_checkpoint", lambda self, path: loaded.append(path) or load(self, path))

    def run(name, max_steps):
        config = on_megatron(max_steps=max_steps, run_dir=str(tmp_path / name), checkpointing={"every": 2})
        return nemo_rl.GRPOTrainer(config).fit(rows, a_digit)

    whole = run("whole", 4)
    run("parts", 2)
    assert not loaded
    resumed = run("parts", 4)
    assert len(loaded) == 1
    assert resumed.step == 4
    for name in ("train/loss", "train/grad_norm", "reward/mean"):
        assert resumed.history[-1][name] == whole.history[-1][name]
    assert (resumed.model_path / "model.safetensors").read_bytes() == (
        whole.model_path / "model.safetensors"
    ).read_bytes()
