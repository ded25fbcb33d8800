"""Configuration of PPO, of its critic, losses and advantages: every default in one place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from attrs import Attribute, Factory, evolve, field, frozen

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.schema import (
    ComponentChoice,
    Mistake,
    OptimizerConfig,
    PolicyConfig,
    RolloutRunConfig,
    component,
    mistake,
)
from nemo_rl_core.schema.validators import ge, gt, le, one_of, optional

__all__ = [
    "ClippedSurrogateConfig",
    "ClippedValueConfig",
    "CriticConfig",
    "CriticOptimizerConfig",
    "GAEConfig",
    "PPOConfig",
]

KLType = Literal["k1", "k2", "k3"]


def _one_lambda(instance: GAEConfig, attribute: Attribute[Any], value: float | None) -> None:
    if value is not None and instance.policy_lambda is not None:
        raise ConfigError("length_adaptive_alpha makes a lambda of its own for the policy; remove policy_lambda")


@frozen(kw_only=True)
class GAEConfig:
    """Options of the advantages `gae`."""

    gamma: float = field(default=1.0, validator=[ge(0), le(1)])
    """Discount per sampled token."""
    gae_lambda: float = field(default=0.95, validator=[ge(0), le(1)])
    """Lambda of policy and critic: 0 trusts the critic, 1 the reward that came in the end."""
    policy_lambda: float | None = field(default=None, validator=optional([ge(0), le(1)]))
    """Lambda of the advantages alone; None is `gae_lambda`."""
    critic_lambda: float | None = field(default=None, validator=optional([ge(0), le(1)]))
    """Lambda of the returns that the critic is trained on; None is `gae_lambda`. VAPO takes 1 (no bias from a critic
    that knows nothing yet)."""
    length_adaptive_alpha: float | None = field(default=None, validator=[optional(gt(0)), _one_lambda])
    """If set, the policy's lambda of a sequence of l sampled tokens is 1 - 1 / (alpha * l), never below 0; VAPO takes
    0.05."""
    whiten: bool = True
    """Give the advantages of the batch a mean of 0 and a variance of 1."""
    whiten_rewards: bool = False
    """Divide the rewards of tokens by their standard deviation over the batch; their mean stays."""
    bootstrap_truncated: bool = False
    """A rollout that was cut off goes on in the critic's mind: the value of its last state follows its last token.
    False takes it as ended, with nothing to come."""


@frozen(kw_only=True)
class ClippedSurrogateConfig:
    """Options of the loss `ppo_clip`."""

    ratio_clip_min: float = field(default=0.2, validator=[ge(0), le(1)])
    """The ratio is held above 1 - ratio_clip_min (where the advantage is negative)."""
    ratio_clip_max: float = field(default=0.2, validator=ge(0))
    """The ratio is held below 1 + ratio_clip_max (where the advantage is positive); VAPO takes 0.28."""
    ratio_clip_c: float | None = field(default=None, validator=optional(gt(1)))
    """Dual clip: where the advantage is negative the term never exceeds -advantage * ratio_clip_c."""
    ratio_against: Literal["step_start", "rollout"] = field(
        default="step_start", validator=one_of("step_start", "rollout")
    )
    """Denominator of the ratio: the policy before this step's updates, or the logprobs of the engine, which rollouts
    from older weights need."""
    aggregation: Literal["token", "sequence"] = field(default="token", validator=one_of("token", "sequence"))
    """token: every trained token of the global batch counts the same; sequence: every sequence does, by the mean over
    its tokens."""
    entropy_coef: float = field(default=0.0, validator=ge(0))
    """Weight of the entropy of the policy, which is raised."""
    reference_kl_beta: float = field(default=0.0, validator=ge(0))
    """Weight of a KL to the reference policy in the loss; 0 needs no reference model."""
    reference_kl_type: KLType = field(default="k3", validator=one_of("k1", "k2", "k3"))
    """Estimator of its value; the gradient is always that of the expectation."""


@frozen(kw_only=True)
class ClippedValueConfig:
    """Options of the loss `ppo_value`."""

    clip_range: float | None = field(default=0.2, validator=optional(gt(0)))
    """A value earns nothing by moving further than this from what it was before the step; None does not clip."""
    scale: float = field(default=1.0, validator=gt(0))
    """Factor on the loss, beside the 1/2 of the square."""
    aggregation: Literal["token", "sequence"] = field(default="token", validator=one_of("token", "sequence"))
    """As in `ppo_clip`."""


@frozen(kw_only=True)
class CriticOptimizerConfig(OptimizerConfig):
    """The optimizer of the critic."""

    lr: float = field(default=5e-6, validator=ge(0))
    """Peak learning rate; `scheduler` scales it."""


@frozen(kw_only=True)
class CriticConfig(PolicyConfig):
    """The critic: a model with one number for each token, with its own backend, workers, optimizer and schedule."""

    model_name: str | None = None
    """What it starts from; None is the policy's. A checkpoint of a reward model is a good start."""
    head: Literal["scalar"] = "scalar"
    """Always scalar."""
    optimizer: CriticOptimizerConfig = Factory(CriticOptimizerConfig)
    """The optimizer of the critic."""


@frozen(kw_only=True)
class PPOConfig(RolloutRunConfig):
    """A PPO run: `algorithm: ppo`."""

    algorithm: Any = "ppo"
    num_generations_per_prompt: int = field(default=16, validator=ge(1))
    """Rollouts of one prompt; 1 is enough, as the baseline is the critic."""
    updates_per_step: int = field(default=1, validator=ge(1))
    """Optimizer steps (minibatches) of each model per pass over the rollouts of a step."""
    epochs_per_step: int = field(default=4, validator=ge(1))
    """Passes of the policy over the rollouts of a step."""
    critic_epochs_per_step: int | None = field(default=None, validator=optional(ge(1)))
    """Passes of the critic; None is `epochs_per_step`."""
    critic_warmup_steps: int = field(default=0, validator=ge(0))
    """First steps of the run in which only the critic is trained."""
    shuffle_minibatches: bool = True
    """Cut each pass into other minibatches, in an order that follows from the seed and the step."""
    critic: CriticConfig = Factory(CriticConfig)
    """The model that estimates what is still to come."""
    critic_learning_rate: float | None = field(
        default=None, validator=optional(ge(0)), metadata={"shorthand_for": "critic.optimizer.lr"}
    )
    """Shorthand for `critic.optimizer.lr`."""
    loss: ComponentChoice = component("losses", "ppo_clip")
    """The objective of the policy."""
    value_loss: ComponentChoice = component("losses", "ppo_value")
    """The objective of the critic."""
    advantage: ComponentChoice = component("advantages", "gae")
    """The advantage estimator; it must also give returns."""
    reward_kl_beta: float = field(default=0.0, validator=ge(0))
    """Weight of a KL to the reference policy in the reward of each token; 0 needs no reference model."""
    reward_kl_type: KLType = field(default="k1", validator=one_of("k1", "k2", "k3"))
    """Its estimator."""

    @property
    def num_updates_per_step(self) -> int:
        """Optimizer steps of the policy in one step."""
        return self.updates_per_step * self.epochs_per_step

    @property
    def num_passes_per_step(self) -> int:
        """How often the policy is trained on each rollout."""
        return self.epochs_per_step

    @property
    def num_critic_epochs(self) -> int:
        """How often the critic is trained on each rollout."""
        return self.critic_epochs_per_step or self.epochs_per_step

    @property
    def critic_with_schedule(self) -> CriticConfig:
        """The critic, with the optimizer steps of the run as the length of its schedule if it needs one."""
        schedule = self.critic.scheduler
        if schedule.name == "constant" or schedule.total_steps is not None or self.max_steps is None:
            return self.critic
        total = self.max_steps * self.updates_per_step * self.num_critic_epochs
        return evolve(self.critic, scheduler=evolve(schedule, total_steps=total))

    def check(self) -> Iterator[Mistake]:
        """Yield every mistake that lies between fields, each with its path, value and fix."""
        return _mistakes(self)


# -- mistakes between the fields ------------------------------------------------------------------------------


def _mistakes(config: PPOConfig) -> Iterator[Mistake]:
    """Yield a mistake for each combination of fields that cannot be meant.

    Options of another loss than ours are not judged here.
    """
    yield from _steps(config)
    yield from _critic(config)
    if isinstance(config.loss.options, ClippedSurrogateConfig):
        yield from _loss(config, config.loss.options)


def _steps(config: PPOConfig) -> Iterator[Mistake]:
    rollouts = config.num_prompts_per_step * config.num_generations_per_prompt
    if config.updates_per_step > rollouts:
        yield mistake(
            "updates_per_step",
            f"{config.updates_per_step} minibatches need as many rollouts, and a step has {rollouts} "
            f"({config.num_prompts_per_step} prompts x {config.num_generations_per_prompt})",
            f"set updates_per_step to at most {rollouts}",
            related=("num_prompts_per_step", "num_generations_per_prompt"),
        )
    if config.max_steps is not None and config.critic_warmup_steps >= config.max_steps:
        yield mistake(
            "critic_warmup_steps",
            f"the policy is not trained in the first {config.critic_warmup_steps} steps, and the run has "
            f"{config.max_steps}",
            "lower it, or raise max_steps",
            related=("max_steps",),
        )


def _critic(config: PPOConfig) -> Iterator[Mistake]:
    schedule = config.critic.scheduler
    if schedule.name != "constant" and schedule.total_steps is None and config.max_steps is None:
        yield mistake(
            "critic.scheduler.total_steps",
            f"a {schedule.name} schedule must know when it ends, but max_steps is not set either",
            "set max_steps, or critic.scheduler.total_steps (optimizer steps of the critic)",
            related=("critic.scheduler.name",),
        )


def _loss(config: PPOConfig, loss: ClippedSurrogateConfig) -> Iterator[Mistake]:
    if config.reward_kl_beta > 0 and loss.reference_kl_beta > 0:
        yield mistake(
            "reward_kl_beta",
            f"{config.reward_kl_beta} in the reward and loss.options.reference_kl_beta={loss.reference_kl_beta} in the "
            "loss are two penalties for one thing",
            "keep one of the two",
            related=("loss.options.reference_kl_beta",),
        )
    if config.rollouts.staleness > 0 and loss.ratio_against == "step_start":
        yield mistake(
            "loss.options.ratio_against",
            f"'step_start', with rollouts up to {config.rollouts.staleness} steps old: the gradient of rollouts from "
            "other weights is biased",
            "set it to 'rollout', or take a loss with a correction, such as clipped_pg of nemo-rl-grpo",
            related=("rollouts.staleness",),
        )
