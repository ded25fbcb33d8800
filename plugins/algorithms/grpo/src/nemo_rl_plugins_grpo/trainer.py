"""The trainers of the high-level interface."""

from __future__ import annotations

from nemo_rl_core.training.trainer import Trainer

__all__ = [
    "CISPOTrainer",
    "DAPOTrainer",
    "DrGRPOTrainer",
    "GRPOTrainer",
    "GSPOTrainer",
    "RLOOTrainer",
    "ReinforcePPTrainer",
]


class GRPOTrainer(Trainer):
    """`GRPOTrainer.from_pretrained("model").fit(dataset=..., reward_fn=...)`."""

    algorithm = "grpo"


class DAPOTrainer(Trainer):
    """`DAPOTrainer.from_pretrained("model").fit(dataset=..., reward_fn=...)`."""

    algorithm = "dapo"


class GSPOTrainer(Trainer):
    """`GSPOTrainer.from_pretrained("model").fit(dataset=..., reward_fn=...)`."""

    algorithm = "gspo"


class CISPOTrainer(Trainer):
    """`CISPOTrainer.from_pretrained("model").fit(dataset=..., reward_fn=...)`."""

    algorithm = "cispo"


class DrGRPOTrainer(Trainer):
    """`DrGRPOTrainer.from_pretrained("model").fit(dataset=..., reward_fn=...)`."""

    algorithm = "dr_grpo"


class RLOOTrainer(Trainer):
    """`RLOOTrainer.from_pretrained("model").fit(dataset=..., reward_fn=...)`."""

    algorithm = "rloo"


class ReinforcePPTrainer(Trainer):
    """`ReinforcePPTrainer.from_pretrained("model").fit(dataset=..., reward_fn=...)`."""

    algorithm = "reinforce_pp"
