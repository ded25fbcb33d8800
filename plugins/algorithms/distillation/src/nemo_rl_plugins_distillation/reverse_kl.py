"""KL(student | teacher): the student must have no mass where the teacher has none."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from nemo_rl_plugins_distillation.base import TeacherLoss
from nemo_rl_plugins_distillation.support import Pair

__all__ = ["ReverseKLLoss", "reverse_kl"]


def reverse_kl(pair: Pair, entropy: Tensor | None, *, outside_logprob: float) -> Tensor:
    """[M, T] sum of p_student (log p_student - log p_teacher).

    Source: MiniLLM, arXiv:2306.08543, its divergence without its policy gradient.

    Args:
        pair: Of one pair of distributions. If it is open the sum goes over the whole vocabulary, with
            `outside_logprob` for the teacher's log p outside.
        entropy: [M, 1] of the student's whole distribution, for an open pair.
        outside_logprob: See `DivergenceConfig`.
    """
    teacher, mass = pair.teacher.to(pair.student.dtype), pair.student.exp()
    if not pair.open or entropy is None:
        return (mass * (pair.student - teacher)).sum(-1)
    # The student's p log p inside and outside together are its negative entropy.
    return -entropy - (mass * teacher).sum(-1) - outside_logprob * (1 - mass.sum(-1))


class ReverseKLLoss(TeacherLoss):
    """Reverse KL."""

    reads_entropy: ClassVar[bool] = True

    def divergence(self, pair: Pair, entropy: Tensor | None) -> Tensor:
        """[M, T] divergence of each token; see `reverse_kl`."""
        return reverse_kl(pair, entropy, outside_logprob=self.config.outside_logprob)
