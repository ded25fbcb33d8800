"""Contracts of environments and rewards: what answers the policy and scores it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from attrs import field, frozen

from nemo_rl_core.errors import EnvironmentFailure
from nemo_rl_core.records.message import Message, Task

if TYPE_CHECKING:
    from nemo_rl_core.protocols.policy import PolicySession

__all__ = ["DrivingEnvironment", "Environment", "EnvironmentContext", "EnvironmentStep", "SingleTurnEnvironment"]


@frozen(kw_only=True)
class EnvironmentStep:
    """What an environment answers to one assistant message."""

    messages: Sequence[Message] = ()
    """Turns to append before the policy speaks again (tool results, a user's reply)."""
    rewards: Mapping[str, float] = field(factory=dict)
    """Rewards earned by this step, by name; the rollout's reward is the sum over steps and names."""
    terminated: bool = False
    """The episode has ended by its own rules."""
    truncated: bool = False
    """The episode was cut off (turn or time limit)."""
    info: Mapping[str, Any] = field(factory=dict)
    """Recorded with the rollout; numbers are averaged as metrics `env/<key>`."""


class EnvironmentContext(Protocol):
    """What the rollout engine lends to an environment."""

    async def run_in_pool(
        self, function: Callable[..., Any], *args: Any, timeout_s: float | None = None, **kwargs: Any
    ) -> Any:
        """Run a picklable function in a worker process that is killed at the deadline.

        Raises:
            DeadlineExceeded: It did not answer in `timeout_s` (default: `rollouts.reward_timeout_s`).
            Exception: Whatever `function` raised.
        """
        ...


@runtime_checkable
class Environment(Protocol):
    """One episode. A component of group `nemo_rl.environments`.

    A class, called `EnvironmentClass(config, context)` once per episode, so instances share no state;
    keep construction cheap and put what is heavy in the class or the pool. Methods may be sync or async;
    a sync method must not block for long (use `context.run_in_pool`).

    A class may have an attribute `example`: a mapping with a `task` and the `response` that is right (and what
    else `nemo_rl_core.testing.EnvironmentCase` takes), which `nemo-rl plugins check` plays.

    Attributes:
        config_class: attrs class of the environment's options.
    """

    config_class: ClassVar[type]

    def __init__(self, config: Any, context: EnvironmentContext) -> None:
        """Keep both as `self.config` and `self.context`, for a class that derives from this one."""
        vars(self).update(config=config, context=context)

    def reset(self, task: Task, seed: int) -> Sequence[Message] | Awaitable[Sequence[Message]]:
        """Start the episode and return the messages that form the prompt.

        Equal task and seed give an equal episode.
        """
        ...

    def step(self, message: Message) -> EnvironmentStep | Awaitable[EnvironmentStep]:
        """Answer the policy's message. Called until `terminated`, `truncated` or the turn limit."""
        ...

    def close(self) -> Awaitable[None] | None:
        """Release what the episode holds; called exactly once, also after an error. May be called again."""
        return None


class SingleTurnEnvironment:
    """Base for the common case: one prompt, one response, one score. Override `score`."""

    config_class: ClassVar[type] = dict

    def __init__(self, config: Any, context: EnvironmentContext) -> None:
        self.config = config
        self.context = context
        self.task: Task = {}

    def reset(self, task: Task, seed: int) -> Sequence[Message]:
        """The task's `prompt`, as one user message if it is a string."""
        self.task = task
        prompt = task["prompt"]
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)

    async def score(self, task: Task, response: str) -> float | Mapping[str, float]:
        """Reward of one response."""
        raise NotImplementedError(f"{type(self).__name__} must define score(task, response)")

    async def step(self, message: Message) -> EnvironmentStep:
        """Score the response and end the episode."""
        score = await self.score(self.task, message.get("content", ""))
        rewards = dict(score) if isinstance(score, Mapping) else {"reward": float(score)}
        return EnvironmentStep(rewards=rewards, terminated=True)

    def close(self) -> None:
        """Nothing is held."""


class DrivingEnvironment:
    """Base of an environment that asks the policy itself, as often and with what it likes. Override `drive`.

    It is for programs that hold the loop in their own hands, such as an agent with a client of the chat API. What
    the policy is asked through the session is recorded, and becomes the rollout.
    """

    config_class: ClassVar[type] = dict

    def __init__(self, config: Any, context: EnvironmentContext) -> None:
        self.config = config
        self.context = context

    async def drive(self, task: Task, seed: int, policy: PolicySession) -> EnvironmentStep:
        """Play the whole episode.

        Args:
            task: The row.
            seed: Equal for the rollouts of a group.
            policy: Asks the policy and records it. It takes `rollouts.max_turns` calls, and none after `drive` has
                returned.

        Returns:
            Rewards and how it ended; messages are left out of account. Neither terminated nor truncated counts as
            terminated.
        """
        raise NotImplementedError(f"{type(self).__name__} must define drive(task, seed, policy)")

    def reset(self, task: Task, seed: int) -> Sequence[Message]:
        """Not called: there is no prompt before the environment asks."""
        raise EnvironmentFailure(f"{type(self).__name__} asks the policy itself: call drive() instead of reset().")

    def step(self, message: Message) -> EnvironmentStep:
        """Not called, as `reset`."""
        raise EnvironmentFailure(f"{type(self).__name__} asks the policy itself: call drive() instead of step().")

    def close(self) -> Awaitable[None] | None:
        """Nothing is held."""
        return None
