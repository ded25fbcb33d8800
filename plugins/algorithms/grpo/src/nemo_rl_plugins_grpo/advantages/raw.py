"""The reward as it is: for losses and baselines of one's own, and for one rollout a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from nemo_rl_core.models.numerics.whitening import whiten
from nemo_rl_plugins_grpo.advantage_config import RawConfig
from nemo_rl_plugins_grpo.advantages.rewards import require_finite, returns

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["RawAdvantages"]


class RawAdvantages:
    """The reward of its response at each token, and the `token_rewards` from there on; no baseline."""

    config_class: ClassVar[type] = RawConfig
    takes_token_rewards: ClassVar[bool] = True

    def __init__(self, config: RawConfig | None = None) -> None:
        self.config = config or RawConfig()

    @property
    def conformance(self) -> Mapping[str, object]:
        """For its kit: whitening compares with the whole batch."""
        return {"baseline": "batch" if self.config.whiten else "none"}

    def __call__(self, batch: BatchedDataDict) -> Tensor:
        """[N] float32 from `rewards` [B] and, if present, `token_rewards` [N]; 0 where nothing is trained."""
        advantages, mask = returns(batch, batch["rewards"].to(torch.float64)), batch["loss_mask"]
        if self.config.whiten:
            require_finite(batch["rewards"])
            advantages = whiten(advantages, mask, epsilon=self.config.epsilon)
        return advantages.to(torch.float32).masked_fill(~mask, 0.0)
