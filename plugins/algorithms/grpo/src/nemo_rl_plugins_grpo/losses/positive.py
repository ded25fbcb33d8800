"""Imitation of what was rewarded: the negative log-likelihood of good responses beside a policy gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from nemo_rl_core.protocols.loss import Metric
from nemo_rl_plugins_grpo.losses.tokens import Tokens

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["positive_nll", "unopposed_direction"]


def positive_nll(tokens: Tokens, batch: BatchedDataDict, *, threshold: float) -> tuple[Tensor, Metric]:
    """-logprob at the tokens of sequences whose reward is above `threshold`.

    Source: the positive example loss of VAPO, arXiv:2504.05118 section 4.3. Departure: it is added up and divided as
    the policy gradient is (over all trained tokens or sequences of the global batch), not by the tokens of the
    rewarded responses alone; one success in a batch of failures then does not pull as hard as a batch of successes.

    Args:
        tokens: The micro-batch.
        batch: `raw_rewards` [B], or `rewards` where there are none.
        threshold: What a reward must exceed.

    Returns:
        [N] nats with gradient, 0 elsewhere; and its mean over the tokens of rewarded responses.
    """
    rewards = batch["raw_rewards"] if "raw_rewards" in batch else batch["rewards"]
    rewarded = batch.expand_to_tokens(rewards > threshold) & tokens.mask
    nll = (-tokens.logprobs).masked_fill(~rewarded, 0.0)
    return nll, Metric(nll.detach().sum(), rewarded.sum())


def unopposed_direction(batch: BatchedDataDict, reads: frozenset[str], *, threshold: float) -> Tensor:
    """[N] where a loss with this term must raise (+1) or lower (-1) a logprob; 0 where its two terms disagree.

    For the conformance kit, whose advantages and rewards are drawn apart from each other.
    """
    rewarded = batch.expand_to_tokens(batch["rewards"] > threshold)
    direction = batch["advantages"].sign() * batch["loss_mask"]
    unopposed: Tensor = direction.masked_fill(rewarded & (direction < 0), 0.0).double()
    return unopposed
