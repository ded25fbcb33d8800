"""GDPO: several rewards, each normalised in its group before they are added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from nemo_rl_core.errors import DataError
from nemo_rl_core.models.numerics.whitening import whiten
from nemo_rl_plugins_grpo.advantage_config import GDPOAdvantagesConfig
from nemo_rl_plugins_grpo.advantages.grpo import group_relative_advantages
from nemo_rl_plugins_grpo.advantages.rewards import require_finite
from nemo_rl_plugins_grpo.grouping import group_rollouts

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["GDPOAdvantages"]

_PREFIX = "reward/"


class GDPOAdvantages:
    """Group reward-decoupled normalisation (GDPO, arXiv:2601.05242).

    If rewards are added first and then normalised, equal sums have equal advantages whatever they are made of. If each
    is normalised first, they stay apart, and a reward that varies little still counts. The estimator reads the named
    rewards, not their (shaped) sum.
    """

    config_class: ClassVar[type] = GDPOAdvantagesConfig

    def __init__(self, config: GDPOAdvantagesConfig | None = None) -> None:
        self.config = config or GDPOAdvantagesConfig()

    @property
    def conformance(self) -> Mapping[str, object]:
        """For its kit: whitening compares with the whole batch."""
        return {"baseline": "batch" if self.config.whiten else "group", "counts_forks_once": True}

    def __call__(self, batch: BatchedDataDict) -> Tensor:
        """[N] float32 advantages from the fields `reward/<name>` [B] and `group_ids` [B]; 0 where nothing is trained.

        Raises:
            DataError: There is no named reward, or not one that has a weight, or one is not finite.
        """
        grouping = group_rollouts(batch)
        total = torch.zeros(grouping.num_rollouts, dtype=torch.float64, device=batch["loss_mask"].device)
        for field, weight in self._weights(batch).items():
            if self.config.whiten:
                require_finite(batch[field], field)
            total += weight * group_relative_advantages(
                grouping.per_rollout(batch[field].to(torch.float64)),
                grouping,
                normalize=True,
                leave_one_out=self.config.leave_one_out,
                epsilon=self.config.epsilon,
            )
        if self.config.whiten:
            total = whiten(total, epsilon=self.config.epsilon)
        per_sequence = total[grouping.rollout_of].to(torch.float32)
        return batch.expand_to_tokens(per_sequence).masked_fill(~batch["loss_mask"], 0.0)

    def _weights(self, batch: BatchedDataDict) -> dict[str, float]:
        """Weight of each field, in the order of the names."""
        fields = sorted(name for name in batch.field_names if name.startswith(_PREFIX))
        names = [name.removeprefix(_PREFIX) for name in fields]
        missing = sorted(self.config.weights.keys() - set(names))
        if missing or (not fields and len(batch)):
            raise DataError(
                f"The advantages `gdpo` found the rewards {names}"
                + (f" and have weights for {missing}, which no rollout has. " if missing else ". ")
                + "Let the reward return a mapping of named rewards, with the names that `weights` has."
            )
        weights = self.config.weights
        return {_PREFIX + name: weights.get(name, 0.0) if weights else 1.0 for name in names}
