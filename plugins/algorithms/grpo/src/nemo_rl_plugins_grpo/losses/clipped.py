"""The clipped policy-gradient loss: PPO's surrogate with the options of GRPO and DAPO."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from nemo_rl_plugins_grpo.loss_config import ClippedPGConfig
from nemo_rl_plugins_grpo.losses.base import RatioLoss
from nemo_rl_plugins_grpo.losses.tokens import Tokens

__all__ = ["ClippedPolicyGradientLoss", "clipped_surrogate"]


class ClippedPolicyGradientLoss(RatioLoss):
    """-min(ratio * A, clip(ratio) * A) for each token.

    Sources: PPO, arXiv:1707.06347 eq. 7; token mean and separate bounds, DAPO, arXiv:2503.14476; dual
    clip, arXiv:1912.09729.
    """

    config_class: ClassVar[type] = ClippedPGConfig

    def ratio_terms(self, ratio: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """[N] each: the clipped surrogate, bounded again where the advantage is negative if `ratio_clip_c` is set."""
        advantages = tokens.advantages
        terms, low, high = clipped_surrogate(ratio, advantages, self.bounds)
        if self.config.ratio_clip_c is not None:
            bounded = torch.minimum(terms, -advantages * self.config.ratio_clip_c)
            terms = torch.where(advantages < 0, bounded, terms)
        return terms, low, high


def clipped_surrogate(ratio: Tensor, advantages: Tensor, bounds: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """-min(ratio * A, clip(ratio) * A); and where the clip takes the gradient away, below and above.

    Args:
        ratio: [N] with gradient.
        advantages: [N].
        bounds: Of the ratio.
    """
    low, high = bounds
    terms = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
    held = ratio.detach()
    return terms, (held < low) & (advantages < 0), (held > high) & (advantages > 0)
