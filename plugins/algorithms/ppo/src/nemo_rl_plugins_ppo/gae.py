"""Generalised advantage estimation, with the decoupled and length-adaptive lambdas of VAPO.

Legend: B sequences, N tokens in all, M trained tokens of the sequence that has most.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from nemo_rl_core.errors import ConfigError, DataError
from nemo_rl_core.models.numerics.whitening import whiten
from nemo_rl_plugins_ppo.config import GAEConfig

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["GeneralizedAdvantages", "generalized_advantages"]

_VARIANCE_FLOOR = 1e-8
"""Added to the variance in whitening, as is usual for PPO."""


class GeneralizedAdvantages:
    """GAE (arXiv:1506.02438) over the sampled tokens of each sequence; VAPO's lambdas (arXiv:2504.05118).

    Each sampled token is one step. Tokens that the policy did not sample (prompts, answers of an environment) are part
    of the transition: the state after a sampled token is the one before the *next sampled* token. A rollout whose
    history was rewritten has several sequences; its reward stands at the end of each.

    Args:
        config: See `GAEConfig`.
    """

    config_class: ClassVar[type] = GAEConfig

    def __init__(self, config: GAEConfig | None = None) -> None:
        self.config = config or GAEConfig()

    @property
    def conformance(self) -> Mapping[str, Any]:
        """For its kit: what a critic gives, and that whitening compares with the whole batch."""
        whitened = self.config.whiten or self.config.whiten_rewards
        return {"baseline": "batch" if whitened else "none", "per_token": True, "add_fields": _add_critic}

    def __call__(self, batch: BatchedDataDict) -> Tensor:
        """The advantages, with the policy's lambda.

        Args:
            batch: With `rewards` [B], earned at the last sampled token of each sequence; `values` [N], of the state
                before each token; `loss_mask` [N]. If it has `token_rewards` [N] (a KL penalty, rewards of turns) they
                are added. `bootstrap_truncated` also reads `truncated` [B] and `final_values` [B], of the states that
                the sequences end in.

        Returns:
            [N] float32, 0 where `loss_mask` is False.

        Raises:
            DataError: A reward or a value is not finite.
            ConfigError: A field that the options read is not in the batch.
        """
        mask = batch["loss_mask"]
        advantages = self._recursion(batch, self._policy_lambda(batch))
        if self.config.whiten:
            advantages = whiten(advantages, mask, variance_floor=_VARIANCE_FLOOR)
        return advantages.to(torch.float32)

    def returns(self, batch: BatchedDataDict) -> Tensor:
        """[N] float32 what the critic is to predict, with the critic's lambda: never whitened; 0 where masked."""
        config = self.config
        lambdas = _everywhere(config.gae_lambda if config.critic_lambda is None else config.critic_lambda, batch)
        advantages = self._recursion(batch, lambdas)
        values: Tensor = batch["values"].detach().to(torch.float64).masked_fill(~batch["loss_mask"], 0.0)
        return (advantages + values).to(torch.float32)

    def _policy_lambda(self, batch: BatchedDataDict) -> Tensor:
        """[B] of each sequence."""
        config = self.config
        if config.length_adaptive_alpha is None:
            return _everywhere(config.gae_lambda if config.policy_lambda is None else config.policy_lambda, batch)
        num_steps = batch.sum_per_sequence(batch["loss_mask"].to(torch.float64)).clamp(min=1)
        return (1 - 1 / (config.length_adaptive_alpha * num_steps)).clamp(min=0.0)

    def _recursion(self, batch: BatchedDataDict, lambdas: Tensor) -> Tensor:
        """[N] float64 advantages before whitening."""
        cut_off = {"truncated", "final_values"} if self.config.bootstrap_truncated else set()
        _require(batch, {"values", "rewards"} | cut_off)
        mask, final = batch["loss_mask"], _everywhere(0.0, batch)
        if cut_off:
            truncated = torch.as_tensor(batch["truncated"], dtype=torch.bool)
            final = torch.where(truncated, batch["final_values"].detach().to(torch.float64), final)
        rewards, values = _token_rewards(batch), batch["values"].detach().to(torch.float64)
        _require_finite("reward", rewards[mask], batch.sequence_index[mask])
        _require_finite("value", values[mask], batch.sequence_index[mask])
        _require_finite("value of a last state", final, torch.arange(len(batch)))
        if self.config.whiten_rewards:
            rewards = whiten(rewards, mask, variance_floor=_VARIANCE_FLOOR, shift_mean=False)
        return generalized_advantages(rewards, values, batch, lambdas, final_values=final, gamma=self.config.gamma)


def generalized_advantages(
    rewards: Tensor, values: Tensor, batch: BatchedDataDict, lambdas: Tensor, *, final_values: Tensor, gamma: float
) -> Tensor:
    """delta_t + gamma lambda A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t, t running over the trained tokens alone.

    Args:
        rewards: [N] earned by each token; only those of trained tokens count.
        values: [N] of the state before each token.
        batch: For its `loss_mask` and the borders of its sequences.
        lambdas: [B].
        final_values: [B] of the state after the last trained token; 0 where the episode is over.
        gamma: Discount per trained token.

    Returns:
        [N] float64, 0 at tokens that are not trained.
    """
    mask = batch["loss_mask"]
    counts = batch.sum_per_sequence(mask.to(torch.int64))
    width = int(counts.max()) if len(batch) else 0
    rows = batch.sequence_index[mask]
    # Aligned to the right: the last trained tokens of all sequences stand in the last column.
    starts = counts.cumsum(0) - counts
    columns = torch.arange(len(rows)) - starts[rows] + (width - counts)[rows]
    grid_rewards, grid_values = (torch.zeros(width, len(batch), dtype=torch.float64) for _ in range(2))
    grid_rewards[columns, rows] = rewards[mask].to(torch.float64)
    grid_values[columns, rows] = values[mask].to(torch.float64)
    decay = gamma * lambdas.to(torch.float64)
    grid_advantages = torch.zeros_like(grid_values)
    following, next_values = torch.zeros(len(batch), dtype=torch.float64), final_values.to(torch.float64)
    for t in range(width - 1, -1, -1):
        following = grid_rewards[t] + gamma * next_values - grid_values[t] + decay * following
        next_values = grid_values[t]
        grid_advantages[t] = following
    out = torch.zeros(batch.num_tokens, dtype=torch.float64)
    out[mask] = grid_advantages[columns, rows]
    return out


def _everywhere(number: float, batch: BatchedDataDict) -> Tensor:
    """[B] float64."""
    return torch.full((len(batch),), number, dtype=torch.float64)


def _token_rewards(batch: BatchedDataDict) -> Tensor:
    """[N] float64: the sequence's reward at its last trained token, and `token_rewards` if there are any."""
    mask = batch["loss_mask"]
    place = torch.where(mask, batch.position_ids, -1)
    last = torch.full((len(batch),), -1, dtype=torch.int64).scatter_reduce(0, batch.sequence_index, place, "amax")
    at_end = mask & (place == batch.expand_to_tokens(last))
    rewards = batch.expand_to_tokens(batch["rewards"].detach().to(torch.float64)).masked_fill(~at_end, 0.0)
    if "token_rewards" in batch:
        rewards = rewards + batch["token_rewards"].detach().to(torch.float64).masked_fill(~mask, 0.0)
    return rewards


def _require(batch: BatchedDataDict, fields: set[str]) -> None:
    if missing := sorted(fields - batch.field_names):
        raise ConfigError(
            f"The advantages `gae` need {', '.join(missing)} in the batch, which has {sorted(batch.field_names)}. They "
            "come from a critic: use them with an algorithm that has one, such as ppo."
        )


def _require_finite(name: str, values: Tensor, sequences: Tensor) -> None:
    """Raise if one of the values [N] is not finite, naming its sequences [N]."""
    bad = ~torch.isfinite(values)
    if bad.any():
        raise DataError(
            f"A {name} is not finite ({float(values[bad][0])}) in sequences {sorted(set(sequences[bad].tolist()))[:8]} "
            "of the batch. Look at the reward of these rollouts, or for a critic that diverges (critic.optimizer.lr)."
        )


def _add_critic(batch: BatchedDataDict, generator: torch.Generator) -> None:
    """Values as a critic gives them, and a penalty of each token."""
    batch.set_tokens("values", torch.rand(batch.num_tokens, generator=generator))
    batch.set_tokens("token_rewards", -0.1 * torch.rand(batch.num_tokens, generator=generator))
    batch.set_sequences("final_values", torch.rand(len(batch), generator=generator))
