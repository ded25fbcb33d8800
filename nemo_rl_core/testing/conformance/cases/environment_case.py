"""The case that the contract of environments plays: an environment and one episode of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attrs import frozen

from nemo_rl_core.config.components import finished_options
from nemo_rl_core.protocols.environment import Environment, EnvironmentContext
from nemo_rl_core.records.message import Task

__all__ = ["EnvironmentCase"]


@frozen(kw_only=True)
class EnvironmentCase:
    """An environment and an episode of it to play.

    The common one-turn case needs the class, a task and a good response.
    """

    environment: Callable[[Any, EnvironmentContext], Environment]
    """The class, called with config and context."""
    task: Task
    """A row."""
    response: str = ""
    """What a policy says that is right; of several turns the last."""
    turns_before: Sequence[str] = ()
    """What it says in the turns before, if the episode has several."""
    wrong_response: str = "I do not know."
    """Said in place of `response`, it earns less."""
    config: object = None
    """Options: an object, or a mapping for its `config_class`; None takes the defaults."""
    max_turns: int | None = None
    """Turns in which an episode ends whatever the policy says; None is those given."""
    deterministic: bool = True
    """False if equal task and seed may give another episode (a judge that samples)."""
    seeded: bool = False
    """True if episodes are drawn from the seed: then several seeds must give several episodes."""
    bad_tasks: Sequence[Task] = ()
    """Rows that it must refuse, such as one without the expected answer."""

    @property
    def turns(self) -> tuple[str, ...]:
        """The whole good episode."""
        return (*self.turns_before, self.response)

    @property
    def wrong_turns(self) -> tuple[str, ...]:
        """The good episode with a wrong end, for as many turns as an episode may have."""
        rest = max(1, self.turn_limit - len(self.turns_before))
        return (*self.turns_before, *[self.wrong_response] * rest)

    @property
    def turn_limit(self) -> int:
        """Turns after which the episode must have ended."""
        return self.max_turns or len(self.turns)

    def options(self) -> Any:
        """Return the options of one environment, as an object of its `config_class`."""
        return finished_options(self.environment, self.config)

    def make(self, context: EnvironmentContext) -> Environment:
        """Make the environment of one episode."""
        return self.environment(self.options(), context)
