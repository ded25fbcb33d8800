"""GSPO: importance ratio, clipping and mismatch weight of whole sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from nemo_rl_plugins_grpo.loss_config import GSPOLossConfig
from nemo_rl_plugins_grpo.losses.base import RatioLoss
from nemo_rl_plugins_grpo.losses.clipped import clipped_surrogate
from nemo_rl_plugins_grpo.losses.ratio import log_ratio, per_sequence, ratio_of
from nemo_rl_plugins_grpo.losses.tokens import Tokens

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["GSPOLoss"]


class GSPOLoss(RatioLoss):
    """The clipped surrogate with one ratio for each sequence: exp of its tokens' mean log-ratio.

    Source: GSPO, arXiv:2507.18071 eq. 5, in the form of its section 4.3 (GSPO-token): a token's own logprob carries
    the gradient of its term, so that advantages may differ between tokens. With one advantage for each sequence
    value and gradient are those of GSPO. Departure: `length_normalized: false` takes the product of the tokens' ratios.
    """

    config_class: ClassVar[type] = GSPOLossConfig

    @property
    def _stops_gradients(self) -> bool:
        """Yes: a token's term depends on all of its sequence, and is differentiated by its own logprob alone."""
        return True

    def ratio(self, tokens: Tokens, batch: BatchedDataDict) -> Tensor:
        """[N] that of the token's sequence, with the gradient of the token."""
        mean = self.config.length_normalized
        by_token = log_ratio(tokens, self.config)
        of_sequence = ratio_of(per_sequence(by_token.detach(), tokens.mask, batch, mean=mean))
        own = tokens.logprobs - tokens.logprobs.detach()  # 0, with the gradient
        return of_sequence * (own if mean else _shared_gradient(own, tokens, batch)).exp()

    def ratio_terms(self, ratio: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """[N] each: the clipped surrogate, and where the lower and the upper bound acted."""
        return clipped_surrogate(ratio, tokens.advantages, self.bounds)

    def correction_log_ratio(self, tokens: Tokens, batch: BatchedDataDict) -> Tensor:
        """[N] of the sequence, formed as its ratio is: times the ratio it gives that of current to sampling policy."""
        by_token = super().correction_log_ratio(tokens, batch)
        return per_sequence(by_token, tokens.mask, batch, mean=self.config.length_normalized)


def _shared_gradient(own: Tensor, tokens: Tokens, batch: BatchedDataDict) -> Tensor:
    """[N] `own` (zeros with a gradient) times its sequence's trained tokens: the gradient of a product of ratios."""
    count = batch.expand_to_tokens(batch.sum_per_sequence(tokens.mask.to(own.dtype)))
    return own * count
