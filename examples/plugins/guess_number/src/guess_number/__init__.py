"""Guess a number, told after each guess whether it is higher or lower: an episode of several turns."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from attrs import field, frozen
from attrs.validators import ge

from nemo_rl_core.protocols.environment import EnvironmentContext, EnvironmentStep
from nemo_rl_core.records.message import Message, Task

__all__ = ["GuessNumber", "GuessNumberConfig"]


@frozen(kw_only=True)
class GuessNumberConfig:
    """Options of the game."""

    highest: int = field(default=9, validator=ge(1))
    """The number lies between 0 and this, both included."""
    max_guesses: int = field(default=4, validator=ge(1))
    """Guesses after which the game is lost."""


class GuessNumber:
    """One game. The number is the row's `number`, or drawn from the episode's seed.

    Rewards: `found` 1 for the number, and `speed` up to 1 for few guesses. A turn without a number counts as a
    guess and is told so, which is how a policy learns the format.
    """

    config_class: ClassVar[type] = GuessNumberConfig
    example: ClassVar[Mapping[str, Any]] = {
        "task": {"prompt": "", "number": 7},
        "turns_before": ["3", "5"],
        "response": "7",
        "max_turns": 4,
    }
    """A game for the conformance kit, `nemo-rl plugins check guess_number`."""

    def __init__(self, config: GuessNumberConfig, context: EnvironmentContext) -> None:
        self.config = config
        self.number = 0
        self.guesses = 0

    def reset(self, task: Task, seed: int) -> Sequence[Message]:
        """The rules of the game."""
        drawn = random.Random(seed).randint(0, self.config.highest)
        self.number = int(task.get("number", drawn))
        self.guesses = 0
        return [{"role": "user", "content": f"Guess my number from 0 to {self.config.highest}: "}]

    def step(self, message: Message) -> EnvironmentStep:
        """Answer one guess."""
        self.guesses += 1
        found = re.search(r"\d+", str(message.get("content", "")))
        guess = int(found.group()) if found and len(found.group()) < 10 else None
        info = {"guesses": self.guesses}
        if guess == self.number:
            speed = 1 - (self.guesses - 1) / self.config.max_guesses
            return EnvironmentStep(rewards={"found": 1.0, "speed": speed}, terminated=True, info=info)
        nothing: dict[str, Any] = {"rewards": {"found": 0.0, "speed": 0.0}, "info": info}
        if self.guesses >= self.config.max_guesses:
            return EnvironmentStep(**nothing, terminated=True)
        hint = "A number! " if guess is None else "Higher. " if guess < self.number else "Lower. "
        return EnvironmentStep(**nothing, messages=[{"role": "user", "content": hint}])

    def close(self) -> None:
        """Nothing is held."""
