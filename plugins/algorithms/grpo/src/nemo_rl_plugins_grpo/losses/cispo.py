"""CISPO: a policy gradient weighted by the bounded ratio, in which every token keeps its gradient."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from nemo_rl_plugins_grpo.loss_config import CISPOLossConfig
from nemo_rl_plugins_grpo.losses.base import RatioLoss
from nemo_rl_plugins_grpo.losses.tokens import Tokens

__all__ = ["CISPOLoss"]


class CISPOLoss(RatioLoss):
    """-A * detached(clip(ratio)) * logprob for each token.

    Source: CISPO, MiniMax-M1, arXiv:2506.13585 eq. 4; bounds of 0 and 5 as in ScaleRL, arXiv:2510.13786. The clip
    fractions are the tokens whose weight was bounded.
    """

    config_class: ClassVar[type] = CISPOLossConfig

    @property
    def _stops_gradients(self) -> bool:
        """Yes: the weight carries none."""
        return True

    def ratio_terms(self, ratio: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """[N] each: the weighted log-likelihood, and where the lower and the upper bound acted."""
        low, high = self.bounds
        weight = ratio.detach()
        return -tokens.advantages * weight.clamp(low, high) * tokens.logprobs, weight < low, weight > high
