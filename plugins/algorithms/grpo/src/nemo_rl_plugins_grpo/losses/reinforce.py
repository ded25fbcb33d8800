"""REINFORCE: the plain policy gradient, without ratio and clip."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from nemo_rl_core.protocols.loss import Metric
from nemo_rl_plugins_grpo.loss_config import ReinforceLossConfig
from nemo_rl_plugins_grpo.losses.base import PolicyGradientLoss
from nemo_rl_plugins_grpo.losses.tokens import Tokens

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["ReinforceLoss"]


class ReinforceLoss(PolicyGradientLoss):
    """-A * logprob for each token.

    Sources: Williams 1992; with the leave-one-out baseline RLOO, arXiv:2402.14740. It has no ratio: for rollouts of
    other weights, or several optimizer steps of one batch, take a loss that has, or a `correction`.
    """

    config_class: ClassVar[type] = ReinforceLossConfig

    def policy_terms(self, tokens: Tokens, batch: BatchedDataDict) -> tuple[Tensor, dict[str, Metric]]:
        """[N] the terms; no metrics of its own."""
        return -tokens.advantages * tokens.logprobs, {}
