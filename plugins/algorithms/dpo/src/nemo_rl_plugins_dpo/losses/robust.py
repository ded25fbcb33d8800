"""Robust DPO: an unbiased estimate of the loss under true labels, given how often labels are wrong.

Source: Chowdhury et al., arXiv:2403.00409, eq. 10.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from nemo_rl_plugins_dpo.config import SmoothedDPOConfig
from nemo_rl_plugins_dpo.pairs import Pairs, ReferencePairLoss, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RobustDPOLoss"]


class RobustDPOLoss(ReferencePairLoss):
    """(-(1 - e) log sigmoid(x) + e log sigmoid(-x)) / (1 - 2 e), e being `label_smoothing`; may be below 0."""

    config_class: ClassVar[type] = SmoothedDPOConfig

    def terms(self, pairs: Pairs) -> Tensor:
        """[P] the loss of each pair."""
        logits, smoothing = self.logits(pairs), self.config.label_smoothing
        plain = -(1 - smoothing) * log_sigmoid(logits) + smoothing * log_sigmoid(-logits)
        terms: Tensor = plain / (1 - 2 * smoothing)
        return terms
