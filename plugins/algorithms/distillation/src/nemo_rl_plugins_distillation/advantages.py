"""Advantages of policy-gradient distillation: how much likelier the teacher finds each sampled token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field, frozen
from torch import Tensor

from nemo_rl_core.schema.validators import gt, optional
from nemo_rl_plugins_distillation.conformance import add_teacher_logprobs

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["OnPolicyDistillationAdvantages", "OnPolicyDistillationConfig"]


@frozen(kw_only=True)
class OnPolicyDistillationConfig:
    """Options of the advantages `on_policy_distillation`."""

    clip: float | None = field(default=None, validator=optional(gt(0)))
    """Bound on the size of an advantage. None sets no bound."""


class OnPolicyDistillationAdvantages:
    """log p_teacher - log p_student of each sampled token: its mean is minus the reverse KL, estimated by one sample.

    Source: "On-policy distillation", Thinking Machines Lab, 2025. It reads `teacher_logprobs` [N], and as the student
    `logprobs` [N] (before the step) or, without them, `rollout_logprobs` of the engine. Each token is credited with its
    own difference alone (a discount of 0). Rewards are not read.
    """

    config_class: ClassVar[type] = OnPolicyDistillationConfig
    required_fields: frozenset[str] = frozenset({"teacher_logprobs"})
    conformance: ClassVar[Mapping[str, Any]] = {
        "baseline": "none",
        "per_token": True,
        "add_fields": add_teacher_logprobs,
    }

    def __init__(self, config: Any = None) -> None:
        self.config = config if config is not None else OnPolicyDistillationConfig()

    def __call__(self, batch: BatchedDataDict) -> Tensor:
        """[N] float32 advantages; 0 where nothing is trained."""
        student: Tensor = batch["logprobs" if "logprobs" in batch else "rollout_logprobs"]
        difference: Tensor = (batch["teacher_logprobs"] - student).detach().float()
        if self.config.clip is not None:
            difference = difference.clamp(-self.config.clip, self.config.clip)
        return difference.masked_fill(~batch["loss_mask"], 0.0)
