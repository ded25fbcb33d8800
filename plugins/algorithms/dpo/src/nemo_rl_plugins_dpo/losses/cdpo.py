"""Conservative DPO: labels are smoothed, so a pair is not driven apart further than its label can be trusted.

Source: Mitchell, "A note on DPO with noisy preferences", 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from nemo_rl_plugins_dpo.config import SmoothedDPOConfig
from nemo_rl_plugins_dpo.pairs import Pairs, ReferencePairLoss, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ConservativeDPOLoss"]


class ConservativeDPOLoss(ReferencePairLoss):
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x), e being `label_smoothing`; least at sigmoid(x) = 1 - e."""

    config_class: ClassVar[type] = SmoothedDPOConfig

    def terms(self, pairs: Pairs) -> Tensor:
        """[P] the loss of each pair."""
        logits, smoothing = self.logits(pairs), self.config.label_smoothing
        terms: Tensor = -(1 - smoothing) * log_sigmoid(logits) - smoothing * log_sigmoid(-logits)
        return terms
