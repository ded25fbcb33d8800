"""KL(teacher | student): the student must put mass wherever the teacher has some."""

from __future__ import annotations

from torch import Tensor

from nemo_rl_plugins_distillation.base import TeacherLoss
from nemo_rl_plugins_distillation.support import Pair

__all__ = ["ForwardKLLoss", "forward_kl"]


def forward_kl(pair: Pair) -> Tensor:
    """[M, T] sum of p_teacher (log p_teacher - log p_student).

    Source: knowledge distillation, arXiv:1503.02531. An open pair needs nothing more: the teacher has no mass outside.
    """
    teacher = pair.teacher.to(pair.student.dtype)
    return (teacher.exp() * (teacher - pair.student)).sum(-1)


class ForwardKLLoss(TeacherLoss):
    """Forward KL; its gradient by the student's logits is p_student - p_teacher."""

    def divergence(self, pair: Pair, entropy: Tensor | None) -> Tensor:
        """[M, T] divergence of each token; see `forward_kl`."""
        return forward_kl(pair)
