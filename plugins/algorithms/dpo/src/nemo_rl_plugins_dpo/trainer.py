"""The trainer of the high-level interface."""

from __future__ import annotations

from nemo_rl_core.training.trainer import Trainer

__all__ = ["DPOTrainer"]


class DPOTrainer(Trainer):
    """`DPOTrainer.from_pretrained("model").fit(dataset=...)`; `loss="kto"` and others choose the objective."""

    algorithm = "dpo"
