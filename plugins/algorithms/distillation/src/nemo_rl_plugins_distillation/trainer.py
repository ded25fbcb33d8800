"""The trainers of the high-level interface."""

from __future__ import annotations

from nemo_rl_core.training.trainer import Trainer

__all__ = ["DistillationTrainer", "OffPolicyDistillationTrainer"]


class DistillationTrainer(Trainer):
    """`DistillationTrainer.from_pretrained("model", teacher={"model_name": "teacher"}).fit(dataset=...)`."""

    algorithm = "distillation"


class OffPolicyDistillationTrainer(Trainer):
    """The same on given answers."""

    algorithm = "off_policy_distillation"
