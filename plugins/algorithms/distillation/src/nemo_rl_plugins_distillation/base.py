"""What the losses against a teacher's likeliest tokens have in common.

Legend: N tokens of a micro-batch, M of them trained, T teachers, K ids, B sequences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from nemo_rl_core.errors import ShapeMismatch
from nemo_rl_core.protocols.loss import Denominator, LossSums, Metric, per_token
from nemo_rl_plugins_distillation.conformance import add_teachers
from nemo_rl_plugins_distillation.loss_config import DivergenceConfig
from nemo_rl_plugins_distillation.support import Pair, on_support

if TYPE_CHECKING:
    from nemo_rl_core.protocols.loss import ModelOutputs
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["TeacherLoss", "nll_sum", "trained"]


class TeacherLoss(ABC):
    """Mean over trained tokens of a divergence between student and teachers, the teachers weighted.

    It reads `top_ids`, `teacher_top_logprobs` [N, T, K] and `teacher_weights` [B, T] of the batch.
    """

    config_class: ClassVar[type] = DivergenceConfig
    denominator: Denominator = "tokens"
    required_fields: frozenset[str] = frozenset({"teacher_top_logprobs"})
    conformance: ClassVar[Mapping[str, Any]] = {"add_fields": add_teachers}
    reads_entropy: ClassVar[bool] = False
    """Whether `divergence` needs the student's entropy when the tail is "zero"."""

    def __init__(self, config: Any = None) -> None:
        self.config = config if config is not None else self.config_class()
        needs = {"top_logprobs"}
        if self.config.nll_weight:
            needs.add("logprobs")
        if self.reads_entropy and self.config.tail == "zero":
            needs.add("entropy")
        self.needs = frozenset(needs)

    @abstractmethod
    def divergence(self, pair: Pair, entropy: Tensor | None) -> Tensor:
        """[M, T] divergence of each token.

        Args:
            pair: Both distributions.
            entropy: [M, 1] of the student's whole distribution if the tail is "zero".
        """

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """Sum over the trained tokens of one micro-batch.

        Raises:
            ShapeMismatch: The student's and the teachers' logprobs differ in shape.
        """
        mask: Tensor = batch["loss_mask"]
        student, teacher = trained(outputs.top_logprobs, batch, "teacher_top_logprobs", dims=3)
        config = self.config
        pair = on_support(student, teacher, tail=config.tail, temperature=config.temperature)
        entropy = None if outputs.entropy is None else outputs.entropy[mask][:, None]
        weights = batch.expand_to_tokens(batch["teacher_weights"])[mask].to(student.dtype)
        divergence = (self.divergence(pair, entropy) * weights).sum()
        total = divergence * config.temperature**2
        count = mask.sum()
        inside = torch.stack([student.detach().exp().sum(-1), teacher.to(student.dtype).exp().sum(-1)])
        mass = (inside * weights).sum((1, 2))
        metrics = {
            "divergence": Metric(divergence.detach(), count),
            "student_top_mass": Metric(mass[0], count),
            "teacher_top_mass": Metric(mass[1], count),
        }
        if config.nll_weight:
            nll = nll_sum(outputs.logprobs, batch)
            total = total + config.nll_weight * nll
            metrics["nll"] = Metric(nll.detach(), count)
        return LossSums(total, metrics)


def trained(student: Tensor | None, batch: BatchedDataDict, name: str, *, dims: int) -> tuple[Tensor, Tensor]:
    """The student's logprobs and the teacher's field `name` at the trained tokens, [M, ...] each.

    Raises:
        ShapeMismatch: They are not of one shape with `dims` dimensions.
    """
    teacher: Tensor = batch[name]
    if student is None or student.shape != teacher.shape or student.ndim != dims:
        shape = None if student is None else list(student.shape)
        raise ShapeMismatch(
            f"outputs.top_logprobs has shape {shape}, {name} {list(teacher.shape)}; both must be equal, with {dims} "
            "dimensions. The batch's `top_ids` are the tokens that the teacher's logprobs are of."
        )
    mask = batch["loss_mask"]
    return student[mask], teacher[mask]


def nll_sum(logprobs: Tensor | None, batch: BatchedDataDict) -> Tensor:
    """[] -log p summed over the trained tokens.

    Raises:
        ShapeMismatch: `logprobs` is not [N].
    """
    return -per_token(logprobs, batch, "outputs.logprobs")[batch["loss_mask"]].sum()
