"""The trainer of the high-level interface."""

from __future__ import annotations

from nemo_rl_core.training.trainer import Trainer

__all__ = ["PPOTrainer"]


class PPOTrainer(Trainer):
    """`PPOTrainer.from_pretrained("model").fit(dataset=..., reward_fn=...)`."""

    algorithm = "ppo"
