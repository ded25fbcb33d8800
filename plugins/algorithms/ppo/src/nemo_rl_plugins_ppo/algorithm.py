"""PPO: a critic beside the policy, advantages from its values, several clipped steps of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.algorithm import AlgorithmContext, BaseAlgorithm, Model, ModelRole, Update
from nemo_rl_plugins_ppo.config import PPOConfig

if TYPE_CHECKING:
    from nemo_rl_core.protocols.loss import Loss
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_core.records.rollout import RolloutGroup

__all__ = ["PPO"]


class PPO(BaseAlgorithm):
    """Proximal policy optimisation (arXiv:1707.06347) with the options of VAPO (arXiv:2504.05118).

    Both losses and the advantage estimator are components chosen by the configuration. A loss of the policy that has a
    set `required_fields` gets those fields: "ref_logprobs" brings the reference role, "logprobs" (the policy before the
    step) only when one batch of rollouts takes several optimizer steps.
    """

    config_class: ClassVar[type] = PPOConfig

    def __init__(self, config: PPOConfig, context: AlgorithmContext) -> None:
        super().__init__(config, context)
        self.loss: Loss = context.resolve("losses", config.loss)
        self.value_loss: Loss = context.resolve("losses", config.value_loss)
        self.advantages: Any = context.resolve("advantages", config.advantage)
        if not callable(getattr(self.advantages, "returns", None)):
            raise ConfigError(
                f"advantage: {config.advantage.name!r} gives no returns to train the critic on (it has no method "
                "`returns(batch)`). Choose gae, or an algorithm without a critic, such as grpo."
            )
        self._loss_fields: frozenset[str] = frozenset(getattr(self.loss, "required_fields", ()))
        self._num_steps = 0

    @property
    def models(self) -> Mapping[str, ModelRole]:
        """The critic, and the reference policy (the policy as it was before the run) if a KL is taken to it."""
        roles = {"critic": ModelRole(config=self.config.critic_with_schedule, trained=True)}
        if "ref_logprobs" in self.required_fields:
            roles["reference"] = ModelRole(config=self.config.policy)
        return roles

    @property
    def takes_stale_rollouts(self) -> bool:
        """Whether the loss of the policy corrects for rollouts of older weights."""
        return bool(getattr(self.loss, "corrects_importance", False))

    @property
    def required_fields(self) -> frozenset[str]:
        """What the loss requires, without `logprobs` if each rollout takes one step; both for a KL in the reward."""
        config: PPOConfig = self.config
        fields = self._loss_fields - ({"logprobs"} if config.num_updates_per_step == 1 else set())
        return fields | ({"logprobs", "ref_logprobs"} if config.reward_kl_beta > 0 else set())

    def build_batch(self, items: Sequence[RolloutGroup]) -> BatchedDataDict:
        """The sequences of all groups."""
        from nemo_rl_core.records.to_batch import batch_from_groups

        return batch_from_groups(items)

    def fill_batch(self, batch: BatchedDataDict, models: Mapping[str, Model]) -> None:
        """Add `required_fields`, `values` [N] of the state before each token, and `final_values` [B]."""
        from nemo_rl_plugins_ppo.alignment import values_after_last, values_before

        super().fill_batch(batch, models)
        outputs = models["critic"].values(batch)
        batch.set_tokens("values", values_before(outputs, batch))
        batch.set_sequences("final_values", values_after_last(outputs, batch))

    def finish_batch(self, batch: BatchedDataDict) -> Mapping[str, float]:
        """Add `advantages` [N], `returns` [N], and `token_rewards` [N] if there is a KL in the reward."""
        from nemo_rl_plugins_ppo.summary import summarise

        metrics = self._penalise(batch) if self.config.reward_kl_beta > 0 else {}
        batch.set_tokens("advantages", self.advantages(batch))
        batch.set_tokens("returns", self.advantages.returns(batch))
        return {**metrics, **summarise(batch)}

    def minibatches(self, batch: BatchedDataDict) -> Sequence[Sequence[int]]:
        """Sequences of each optimizer step of the policy: every pass cut anew into `updates_per_step`."""
        return [part for epoch in range(self.config.epochs_per_step) for part in self._pass(batch, 2 * epoch)]

    def updates(self, batch: BatchedDataDict) -> Sequence[Update]:
        """In each pass first the critic, then (after the warm-up) the policy."""
        config: PPOConfig = self.config
        trains_policy = self._num_steps >= config.critic_warmup_steps
        updates: list[Update] = []
        for epoch in range(max(config.num_critic_epochs, config.epochs_per_step)):
            if epoch < config.num_critic_epochs:
                updates += [Update(part, self.value_loss, "critic") for part in self._pass(batch, 2 * epoch + 1)]
            if epoch < config.epochs_per_step and trains_policy:
                updates += [Update(part, self.loss) for part in self._pass(batch, 2 * epoch)]
        self._num_steps += 1
        return updates

    def state_dict(self) -> dict[str, Any]:
        """How many steps were made, which the warm-up and the order of minibatches follow from."""
        return {"num_steps": self._num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._num_steps = int(state["num_steps"])

    def _pass(self, batch: BatchedDataDict, number: int) -> Sequence[Sequence[int]]:
        """The minibatches of one pass; `number` tells the passes of a step apart."""
        from nemo_rl_plugins_ppo.minibatches import split_rollouts

        config: PPOConfig = self.config
        of_pass = self._num_steps * 1000 + number
        seed = (config.seed, of_pass) if config.shuffle_minibatches else None
        return split_rollouts(len(batch), config.updates_per_step, seed=seed)

    def _penalise(self, batch: BatchedDataDict) -> dict[str, float]:
        """Add `token_rewards`: minus the weighted KL to the reference at each sampled token."""
        from nemo_rl_core.models.numerics.kl import kl_estimate
        from nemo_rl_plugins_ppo.policy_loss import MAX_LOG_RATIO

        mask = batch["loss_mask"]
        log_ratio = batch["ref_logprobs"] - batch["logprobs"]
        kl = kl_estimate(log_ratio, self.config.reward_kl_type, bound=MAX_LOG_RATIO)
        kl = kl.masked_fill(~mask, 0.0)
        batch.set_tokens("token_rewards", -self.config.reward_kl_beta * kl)
        return {"reward_kl": float(kl.sum() / mask.sum().clamp(min=1))}
