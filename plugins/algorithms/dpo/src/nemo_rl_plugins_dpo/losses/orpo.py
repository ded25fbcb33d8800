"""ORPO: likelihood of the chosen answer and the odds ratio of both, in one stage and without a reference.

Source: Hong et al., arXiv:2403.07691, eq. 6 and 7. Departures from its code (and TRL's): the likelihood is that of the
answer alone, not of the prompt too, and the mean over the pairs of the means over their tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from nemo_rl_plugins_dpo.config import ORPOConfig
from nemo_rl_plugins_dpo.pairs import PairLoss, Pairs, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ORPOLoss"]

_LARGEST = -1e-6
"""Logprobs per token are held below this where their odds are taken: a certain token has infinite odds."""


class ORPOLoss(PairLoss):
    """-log p(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected)), log p being the mean by token."""

    config_class: ClassVar[type] = ORPOConfig

    def terms(self, pairs: Pairs) -> Tensor:
        """[P] the loss of each pair."""
        chosen, rejected = pairs.mean_logprobs
        terms: Tensor = -chosen - self.config.beta * log_sigmoid(_log_odds(chosen) - _log_odds(rejected))
        return terms

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """[P] each: the mean logprob of the answers' tokens, times beta."""
        chosen, rejected = pairs.mean_logprobs
        return self.config.beta * chosen, self.config.beta * rejected


def _log_odds(logprobs: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p."""
    held = logprobs.clamp(max=_LARGEST)
    return held - (-held.expm1()).log()
