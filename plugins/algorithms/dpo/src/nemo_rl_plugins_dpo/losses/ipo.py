"""IPO: the square of the distance to a margin, so that certain preferences do not pull without end.

Source: Azar et al., arXiv:2310.12036, eq. 17; log-ratios are per token as its authors meant them (see
`average_logprobs`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from nemo_rl_plugins_dpo.config import IPOConfig
from nemo_rl_plugins_dpo.pairs import Pairs, ReferencePairLoss

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["IPOLoss"]


class IPOLoss(ReferencePairLoss):
    """(chosen log-ratio - rejected log-ratio - 1 / (2 beta))^2."""

    config_class: ClassVar[type] = IPOConfig

    def terms(self, pairs: Pairs) -> Tensor:
        """[P] the loss of each pair."""
        chosen, rejected = pairs.log_ratios
        if self.config.average_logprobs:
            chosen, rejected = chosen / pairs.chosen_length, rejected / pairs.rejected_length
        terms: Tensor = (chosen - rejected - 1 / (2 * self.config.beta)).square()
        return terms
