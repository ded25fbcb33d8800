"""Contract of an advantage estimator: rewards by group in, per-token advantages out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["AdvantageEstimator"]


@runtime_checkable
class AdvantageEstimator(Protocol):
    """Turns rewards into advantages. A component of group `nemo_rl.advantages`.

    An estimator may have the attributes `conformance`, by which its kit knows what is meant (see `AdvantageContract`),
    and `takes_token_rewards`, True if it reads `token_rewards` [N]: rewards of single tokens, such as a KL, beside
    `rewards`.
    """

    def __call__(self, batch: BatchedDataDict) -> Tensor:
        """Estimate the advantages of a whole global batch.

        Must be defined for a group of one and for a group without variance, must not depend on the
        order of the sequences, and carries no gradient.

        Args:
            batch: With `rewards` [B] float32 (total reward of each rollout), `group_ids` [B] int64
                (equal for rollouts of one prompt) and `loss_mask` [N] bool. Rewards by name stand
                beside them as `reward/<name>` [B]. A rollout whose history was rewritten stands as several
                sequences with one (`group_ids`, `rollout_index`) and the same reward.

        Returns:
            [N] float32 advantage of each token; 0 where `loss_mask` is False.
        """
        ...
