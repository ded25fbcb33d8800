"""The trainer of the high-level interface."""

from __future__ import annotations

from nemo_rl_core.training.trainer import Trainer

__all__ = ["SFTTrainer"]


class SFTTrainer(Trainer):
    """`SFTTrainer.from_pretrained("model").fit(dataset=...)`."""

    algorithm = "sft"
