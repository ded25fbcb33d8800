"""Functions that play an episode by calling the environment, and record it with copies of all messages.

It imports nothing heavy: the processes in which an episode is replayed load it, too.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar

from attrs import define, field

from nemo_rl_core.protocols.environment import Environment, EnvironmentContext, EnvironmentStep
from nemo_rl_core.records.message import Message, Task
from nemo_rl_core.testing.conformance.cases.environment_case import EnvironmentCase

__all__ = [
    "PlayedEpisode",
    "begin",
    "close",
    "message_mistake",
    "plain_reward_mistake",
    "play",
    "take_turn",
    "value_of",
]

_Value = TypeVar("_Value")
_ROLES = ("system", "user", "assistant", "tool")


@define
class PlayedEpisode:
    """A record of one episode."""

    prompt: list[Any]
    steps: list[EnvironmentStep] = field(factory=list)
    said: list[tuple[Any, Any]] = field(factory=list)
    """Every message of prompt, policy and environment, and a copy of it as it was when it was said."""
    returned: list[tuple[str, Any, Any]] = field(factory=list)
    """What the environment returned, by name, and a copy of it as it was when it was returned."""

    def hear(self, messages: Sequence[Any]) -> None:
        """Record messages, and copies of them as they are now."""
        self.said += [(message, copy.deepcopy(message)) for message in messages]

    def take(self, name: str, value: object) -> None:
        """Record a returned value, and a copy of it as it is now."""
        self.returned.append((name, value, copy.deepcopy(value)))

    @property
    def ended(self) -> bool:
        """Whether the last step ended it."""
        return bool(self.steps) and (self.steps[-1].terminated or self.steps[-1].truncated)

    @property
    def totals(self) -> dict[str, float]:
        """Rewards by name, summed over the steps."""
        totals: dict[str, float] = {}
        for step in self.steps:
            for name, value in step.rewards.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def plain(self) -> object:
        """Return prompt, answers, rewards and ends as plain values that can be compared."""
        steps = [(list(s.messages), dict(s.rewards), s.terminated, s.truncated) for s in self.steps]
        return copy.deepcopy((self.prompt, steps))


async def begin(made: Environment, task: Task, seed: int) -> PlayedEpisode:
    """Reset the environment and record the prompt."""
    prompt = await value_of(made.reset(task, seed))
    episode = PlayedEpisode(list(prompt))
    episode.hear(episode.prompt)
    episode.take("the prompt", prompt)
    return episode


async def take_turn(made: Environment, turns: Sequence[str], episode: PlayedEpisode, turn: int) -> None:
    """Send one turn of the policy, unless the episode has ended."""
    if turn >= len(turns) or episode.ended:
        return
    message: Message = {"role": "assistant", "content": turns[turn]}
    episode.hear([message])
    step = await value_of(made.step(message))
    assert isinstance(step, EnvironmentStep), f"step returned {type(step).__name__}, not an EnvironmentStep"
    number = len(episode.steps)
    episode.steps.append(step)
    episode.hear(step.messages)
    for part in ("messages", "rewards", "info"):
        episode.take(f"{part} of step {number}", getattr(step, part))


async def play(
    case: EnvironmentCase, context: EnvironmentContext, turns: Sequence[str], *, seed: int = 3, task: Task | None = None
) -> PlayedEpisode:
    """Play one episode alone, until it ends or nothing is left to say, and close it."""
    made = case.make(context)
    try:
        episode = await begin(made, case.task if task is None else task, seed)
        for turn in range(len(turns)):
            await take_turn(made, turns, episode, turn)
        return episode
    finally:
        await value_of(made.close())


async def close(made: Environment, when: str) -> None:
    """Close the environment; an error fails the clause."""
    try:
        await value_of(made.close())
    except Exception as error:
        raise AssertionError(f"closing it {when} raised {type(error).__name__}: {error}") from error


async def value_of(result: Awaitable[_Value] | _Value) -> _Value:
    """Return the value, awaited if necessary."""
    return await result if inspect.isawaitable(result) else result


def message_mistake(message: object) -> str | None:
    """Say in words what is wrong with a message; None if nothing is."""
    if not isinstance(message, Mapping):
        return f"a message is a {type(message).__name__}, not a mapping"
    if message.get("role") not in _ROLES:
        return f"role {message.get('role')!r} is none of {', '.join(_ROLES)}"
    if not isinstance(message.get("content"), str):
        return f"content is {message.get('content')!r:.60}, not text"
    return None


def plain_reward_mistake(rewards: Mapping[Any, object]) -> str | None:
    """Say in words why rewards cannot be recorded as they are; None if they can."""
    for name, value in rewards.items():
        if not isinstance(name, str):
            return f"a reward is named {name!r}, which is no text"
        if type(value) not in (int, float):  # a bool is an int, and numpy.float64 a float
            kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
            return f"reward {name!r} is {value!r:.60}, a {kind}: return a Python float, as in float(value)"
    return None
