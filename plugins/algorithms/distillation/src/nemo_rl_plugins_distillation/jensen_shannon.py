"""The generalised Jensen-Shannon divergence: both against their mixture, so that it is bounded."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from nemo_rl_plugins_distillation.base import TeacherLoss
from nemo_rl_plugins_distillation.loss_config import JensenShannonConfig
from nemo_rl_plugins_distillation.support import Pair

__all__ = ["JensenShannonLoss", "jensen_shannon"]


def jensen_shannon(pair: Pair, *, beta: float) -> Tensor:
    """[M, T] beta KL(teacher | m) + (1 - beta) KL(student | m), with m = beta teacher + (1 - beta) student.

    Source: GKD, arXiv:2306.13649 eq. 1. Where an open pair goes on outside, m is (1 - beta) student, so that each unit
    of the student's mass there costs -(1 - beta) log(1 - beta).
    """
    student, teacher = pair.student, pair.teacher.to(pair.student.dtype)
    mixture = torch.logaddexp(student + math.log(1 - beta), teacher + math.log(beta))
    inside = beta * teacher.exp() * (teacher - mixture) + (1 - beta) * student.exp() * (student - mixture)
    if not pair.open:
        return inside.sum(-1)
    return inside.sum(-1) - (1 - beta) * math.log(1 - beta) * (1 - student.exp().sum(-1))


class JensenShannonLoss(TeacherLoss):
    """Generalised Jensen-Shannon divergence."""

    config_class: ClassVar[type] = JensenShannonConfig

    def divergence(self, pair: Pair, entropy: Tensor | None) -> Tensor:
        """[M, T] divergence of each token; see `jensen_shannon`."""
        return jensen_shannon(pair, beta=self.config.beta)
