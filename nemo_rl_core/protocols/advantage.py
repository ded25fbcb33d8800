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

    An estimator may have two more attributes: `conformance` tells its kit what to expect (see `AdvantageContract`);
    `takes_token_rewards = True` says that it reads `token_rewards` [N], the rewards of single tokens such as a KL, in
    addition to `rewards`.
    """

    def __call__(self, batch: BatchedDataDict) -> Tensor:
        """Estimate the advantages of a whole global batch.

        The result must be defined for a group of one and for a group without variance. It must not depend on the
        order of the sequences, and it carries no gradient.

        Args:
            batch: With `rewards` [B] float32 (total reward of each rollout), `group_ids` [B] int64
                (equal for rollouts of one prompt) and `loss_mask` [N] bool. Named rewards are the
                fields `reward/<name>` [B]. A rollout whose history was rewritten has several sequences,
                which share (`group_ids`, `rollout_index`) and the reward.

        Returns:
            [N] float32 advantage of each token; 0 where `loss_mask` is False.
        """
        ...
