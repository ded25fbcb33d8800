"""PPO learns a task in which half of the prompts are worth nothing, and its critic learns which."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_plugins_ppo.trainer import PPOTrainer


async def vowels(response: str, worth: int) -> float:
    """The share of vowels, if the prompt is worth anything."""
    return worth * sum(letter in "aeiou" for letter in response) / max(len(response), 1)


def run(run_dir, seed, **changes):
    """Histories of one run on the vowel task."""
    torch.set_num_threads(1)
    settings = {
        "model": "scratch:qwen2-tiny",
        "seed": seed,
        "learning_rate": 2e-3,
        "critic_learning_rate": 1e-2,
        "num_prompts_per_step": 16,
        "num_generations_per_prompt": 4,
        "updates_per_step": 2,
        "epochs_per_step": 2,
        "critic_epochs_per_step": 4,
        "critic_warmup_steps": 3,
        "max_steps": 30,
        "run_dir": str(run_dir),
        "policy": {"max_sequence_length": 24},
        "generation": {"max_new_tokens": 8},
        "advantage": {"name": "gae", "options": {"critic_lambda": 1.0}},
        "logging": {"progress": "none"},
        "checkpointing": {"enabled": False},
        **changes,
    }
    return PPOTrainer(settings).fit([{"prompt": f"{n % 2}:", "worth": n % 2} for n in range(64)], vowels).history


def mean(history, name, part):
    values = [entry[name] for entry in history if name in entry][part]
    return sum(values) / len(values)


@pytest.mark.slow
def test_the_reward_and_the_explained_variance_rise(tmp_path):
    history = run(tmp_path, seed=0)
    first, last = slice(0, 3), slice(-3, None)
    assert mean(history, "reward/mean", last) > mean(history, "reward/mean", first) + 0.3
    assert mean(history, "train/critic/explained_variance", first) < 0.2
    assert mean(history, "train/critic/explained_variance", last) > 0.4


if __name__ == "__main__":  # the curves of three seeds
    import sys
    import tempfile

    for seed in map(int, sys.argv[1:] or ("0", "1", "2")):
        entries = run(tempfile.mkdtemp(), seed)
        for entry in entries[::3] + entries[-1:]:
            explained = entry.get("train/critic/explained_variance", float("nan"))
            print(f"seed {seed} step {entry['step']:.0f} reward {entry['reward/mean']:.3f} explained {explained:.3f}")
