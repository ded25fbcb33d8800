"""Dr. GRPO: the clipped surrogate divided by a constant, so that no length is favoured."""

from __future__ import annotations

from typing import ClassVar

from nemo_rl_plugins_grpo.loss_config import DrGRPOLossConfig
from nemo_rl_plugins_grpo.losses.clipped import ClippedPolicyGradientLoss

__all__ = ["DrGRPOLoss"]


class DrGRPOLoss(ClippedPolicyGradientLoss):
    """The clipped surrogate summed over tokens, divided by `constant_length` and the number of sequences.

    Source: Dr. GRPO, arXiv:2503.20783 eq. 3. The mean over a sequence's tokens makes long wrong responses cheap; the
    sum does not. The constant only scales the step. The algorithms of this package set it to the longest response;
    used alone and without it, the loss divides by 1.
    """

    config_class: ClassVar[type] = DrGRPOLossConfig
