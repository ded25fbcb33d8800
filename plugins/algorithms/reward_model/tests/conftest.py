"""A reward model trained in seconds."""

from __future__ import annotations

import random

import pytest
import torch

from nemo_rl_plugins_reward_model.trainer import RewardModelTrainer


def length_pairs(count, seed):
    """The preference: more digits."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        short, long = sorted(rng.sample(range(0, 8), 2))
        texts = ["".join(rng.choice("0123456789") for _ in range(length)) for length in (short, long)]
        rows.append({"prompt": f"{rng.randrange(1000)}?", "chosen": texts[1], "rejected": texts[0]})
    return rows


def _train(run_dir, *, steps=30, seed=0, **loss):
    torch.set_num_threads(1)
    trainer = RewardModelTrainer(
        {
            "model": "scratch:qwen2-tiny",
            "learning_rate": 3e-3,
            "batch_size": 16,
            "max_steps": steps,
            "seed": seed,
            "run_dir": str(run_dir),
            "loss": {"name": "bradley_terry", "options": loss},
            "policy": {"max_sequence_length": 32},
            "validation": {"every": steps, "at_start": True},
            "logging": {"progress": "none"},
            "cluster": {"device": "cpu"},
        }
    )
    return trainer.fit(length_pairs(300, seed), validation_dataset=length_pairs(64, 1000 + seed))


@pytest.fixture
def train_on_lengths():
    """`(run_dir, *, steps, seed, **options of the loss)`: the result of a run that learns to prefer more digits."""
    return _train
