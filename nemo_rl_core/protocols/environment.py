"""Contract of an environment: it answers the policy and scores it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

from attrs import field, frozen

from nemo_rl_core.errors import EnvironmentFailure
from nemo_rl_core.records.message import Message, Task

if TYPE_CHECKING:
    from nemo_rl_core.protocols.policy import PolicySession

__all__ = ["DrivingEnvironment", "Environment", "EnvironmentContext", "EnvironmentStep", "SingleTurnEnvironment"]

_R = TypeVar("_R")


@frozen(kw_only=True)
class EnvironmentStep:
    """An environment's answer to one message of the policy."""

    messages: Sequence[Message] = ()
    """Messages to append before the policy's next turn, such as tool results or a user's reply."""
    rewards: Mapping[str, float] = field(factory=dict)
    """Rewards earned by this step, by name; the rollout's reward is the sum over steps and names."""
    terminated: bool = False
    """Whether the episode has ended by its own rules."""
    truncated: bool = False
    """Whether the episode was cut off, such as by a turn or time limit."""
    info: Mapping[str, Any] = field(factory=dict)
    """Details to record with the rollout; numbers are averaged as metrics `env/<key>`."""


class EnvironmentContext(Protocol):
    """Tools that the rollout engine gives to an environment."""

    async def run_in_pool(
        self, function: Callable[..., _R], *args: object, timeout_s: float | None = None, **kwargs: object
    ) -> _R:
        """Run a picklable function in a worker process that is killed at the deadline.

        Raises:
            DeadlineExceeded: It did not finish within `timeout_s` (default: `rollouts.reward_timeout_s`).
            Exception: Whatever `function` raised.
        """
        ...


@runtime_checkable
class Environment(Protocol):
    """Plays one episode. A component of group `nemo_rl.environments`.

    The core creates `EnvironmentClass(config, context)` once per episode, so instances share no state. Keep
    construction cheap: put heavy objects in the class or the pool. Methods may be sync or async;
    a sync method must not block for long (use `context.run_in_pool`).

    A class may have an attribute `example`: a mapping with a `task`, the correct `response`, and any other field of
    `nemo_rl_core.testing.EnvironmentCase`. `nemo-rl plugins check` plays it.

    Attributes:
        config_class: attrs class of the environment's options.
    """

    config_class: ClassVar[type]

    def __init__(self, config: object, context: EnvironmentContext) -> None:
        """Keep both as `self.config` and `self.context`, for a class that derives from this one."""
        vars(self).update(config=config, context=context)

    def reset(self, task: Task, seed: int) -> Sequence[Message] | Awaitable[Sequence[Message]]:
        """Start the episode and return the messages that form the prompt.

        Equal task and seed must give an equal episode.
        """
        ...

    def step(self, message: Message) -> EnvironmentStep | Awaitable[EnvironmentStep]:
        """Answer the policy's message. Called until the answer is `terminated` or `truncated`, or the turn limit."""
        ...

    def close(self) -> Awaitable[None] | None:
        """Release what the episode holds. Called once, also after an error; a second call must do no harm."""
        return None


class SingleTurnEnvironment:
    """Base for the common case: one prompt, one response, one score. Override `score`."""

    config_class: ClassVar[type] = dict

    def __init__(self, config: Any, context: EnvironmentContext) -> None:
        self.config = config
        self.context = context
        self.task: Task = {}

    def reset(self, task: Task, seed: int) -> Sequence[Message]:
        """Return the task's `prompt`, as one user message if it is a string."""
        self.task = task
        prompt = task["prompt"]
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)

    async def score(self, task: Task, response: str) -> float | Mapping[str, float]:
        """Return the reward of one response: a number, or several by name."""
        raise NotImplementedError(f"{type(self).__name__} must define score(task, response)")

    async def step(self, message: Message) -> EnvironmentStep:
        """Score the response and end the episode."""
        score = await self.score(self.task, message.get("content", ""))
        rewards = dict(score) if isinstance(score, Mapping) else {"reward": float(score)}
        return EnvironmentStep(rewards=rewards, terminated=True)

    def close(self) -> None:
        """Release nothing: the base class holds nothing."""


class DrivingEnvironment:
    """Base of an environment that calls the policy itself, whenever it likes. Override `drive`.

    Use it for a program that runs its own loop, such as an agent with a client of the chat API. The session records
    every call, and the calls become the rollout.
    """

    config_class: ClassVar[type] = dict

    def __init__(self, config: Any, context: EnvironmentContext) -> None:
        self.config = config
        self.context = context

    async def drive(self, task: Task, seed: int, policy: PolicySession) -> EnvironmentStep:
        """Play the whole episode.

        Args:
            task: The row.
            seed: Seed of the episode, equal for the rollouts of a group.
            policy: Session that calls the policy and records the calls. It accepts `rollouts.max_turns` calls, and none
                after `drive` has returned.

        Returns:
            Rewards and how the episode ended; messages are ignored. If neither `terminated` nor `truncated` is set,
            the episode counts as terminated.
        """
        raise NotImplementedError(f"{type(self).__name__} must define drive(task, seed, policy)")

    def reset(self, task: Task, seed: int) -> Sequence[Message]:
        """Refuse: the core does not call it, as there is no prompt before the environment makes a call."""
        raise EnvironmentFailure(f"{type(self).__name__} asks the policy itself: call drive() instead of reset().")

    def step(self, message: Message) -> EnvironmentStep:
        """Refuse, as `reset` does."""
        raise EnvironmentFailure(f"{type(self).__name__} asks the policy itself: call drive() instead of step().")

    def close(self) -> Awaitable[None] | None:
        """Release nothing: the base class holds nothing."""
        return None
