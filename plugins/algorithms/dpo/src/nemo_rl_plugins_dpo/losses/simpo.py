"""SimPO: rewards are mean logprobs, and must differ by a margin; no reference.

Source: Meng et al., arXiv:2405.14734, eq. 6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from nemo_rl_plugins_dpo.config import SimPOConfig
from nemo_rl_plugins_dpo.pairs import PairLoss, Pairs, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SimPOLoss"]


class SimPOLoss(PairLoss):
    """-log sigmoid(beta (mean logprob of chosen - of rejected) - gamma)."""

    config_class: ClassVar[type] = SimPOConfig

    def terms(self, pairs: Pairs) -> Tensor:
        """[P] the loss of each pair."""
        chosen, rejected = self.rewards(pairs)
        return -log_sigmoid(chosen - rejected - self.config.gamma)

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """[P] each: the mean logprob of the answers' tokens, times beta."""
        chosen, rejected = pairs.mean_logprobs
        return self.config.beta * chosen, self.config.beta * rejected
