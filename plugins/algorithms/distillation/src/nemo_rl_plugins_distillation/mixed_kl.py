"""A weighted sum of forward and reverse KL."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from nemo_rl_plugins_distillation.base import TeacherLoss
from nemo_rl_plugins_distillation.forward_kl import forward_kl
from nemo_rl_plugins_distillation.loss_config import MixedKLConfig
from nemo_rl_plugins_distillation.reverse_kl import reverse_kl
from nemo_rl_plugins_distillation.support import Pair

__all__ = ["MixedKLLoss"]


class MixedKLLoss(TeacherLoss):
    """w KL(teacher | student) + (1 - w) KL(student | teacher)."""

    config_class: ClassVar[type] = MixedKLConfig
    reads_entropy: ClassVar[bool] = True

    def divergence(self, pair: Pair, entropy: Tensor | None) -> Tensor:
        """[M, T] the weighted sum."""
        weight: float = self.config.forward_weight
        backward = reverse_kl(pair, entropy, outside_logprob=self.config.outside_logprob)
        return weight * forward_kl(pair) + (1 - weight) * backward
