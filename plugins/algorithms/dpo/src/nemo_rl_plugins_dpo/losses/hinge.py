"""Hinge loss on the difference of implicit rewards.

Source: Zhao et al., SLiC-HF, arXiv:2305.10425, in the form of Liu et al., RSO, arXiv:2309.06657, with a reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from nemo_rl_plugins_dpo.config import DPOLossConfig
from nemo_rl_plugins_dpo.pairs import Pairs, ReferencePairLoss

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HingeDPOLoss"]


class HingeDPOLoss(ReferencePairLoss):
    """max(0, 1 - beta (chosen log-ratio - rejected log-ratio)): a pair that is apart by 1 is left alone."""

    config_class: ClassVar[type] = DPOLossConfig

    def terms(self, pairs: Pairs) -> Tensor:
        """[P] the loss of each pair."""
        return (1 - self.logits(pairs)).relu()
