"""DPO: the logistic loss of the difference of implicit rewards.

Source: Rafailov et al., arXiv:2305.18290, eq. 7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from nemo_rl_plugins_dpo.config import DPOLossConfig
from nemo_rl_plugins_dpo.pairs import Pairs, ReferencePairLoss, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DPOLoss"]


class DPOLoss(ReferencePairLoss):
    """-log sigmoid(beta (chosen log-ratio - rejected log-ratio)); ln 2 while policy and reference are one."""

    config_class: ClassVar[type] = DPOLossConfig

    def terms(self, pairs: Pairs) -> Tensor:
        """[P] the loss of each pair."""
        return -log_sigmoid(self.logits(pairs))
