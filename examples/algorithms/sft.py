"""Supervised fine-tuning on a CPU in seconds: a model of random weights learns to add digits.

Arguments are overrides: `python sft.py max_steps=100 train_on=all`.
"""

from __future__ import annotations

import sys

from nemo_rl_core.config import finalize, load_config
from nemo_rl_plugins_sft.trainer import SFTTrainer

SETTINGS = {
    "algorithm": "sft",
    "model": "scratch:qwen2-tiny",
    "learning_rate": 0.01,
    "batch_size": 20,
    "max_steps": 60,
    "run_dir": "runs/example-sft",
    "policy": {"max_sequence_length": 32, "optimizer": {"eps": 1e-5}},
    "validation": {"every": 20, "at_start": True},
}

if __name__ == "__main__":
    rows = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(10) for b in range(10)]
    trainer = SFTTrainer(finalize(load_config(SETTINGS, overrides=sys.argv[1:])))
    history = trainer.fit(rows[::2] + rows[1::4], validation_dataset=rows[3::4]).history
    losses = [step["train/loss"] for step in history if "train/loss" in step]
    held_out = [step["validation/loss"] for step in history if "validation/loss" in step]
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last; held out {held_out[0]:.3f}, {held_out[-1]:.3f}")
