"""DPO on log-ratios per token, so that length is no way to a larger reward.

Source: Lambert et al., Tulu 3, arXiv:2411.15124, sec. 5.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_rl_plugins_dpo.losses.sigmoid import DPOLoss
from nemo_rl_plugins_dpo.pairs import Pairs

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NormalizedDPOLoss"]


class NormalizedDPOLoss(DPOLoss):
    """The loss `dpo` with each log-ratio divided by its answer's trained tokens; beta is larger here (Tulu 3: 5)."""

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """[P] each: the log-ratio to the reference, per token, times beta."""
        chosen, rejected = super().rewards(pairs)
        return chosen / pairs.chosen_length, rejected / pairs.rejected_length
