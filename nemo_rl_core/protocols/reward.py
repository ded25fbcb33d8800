"""Contract of a reward: scores a response by one number, or by several with names."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, Protocol, runtime_checkable

__all__ = ["Reward", "Score"]

Score = float | Mapping[str, float]
"""One finite number, or finite numbers by name. The reward of a rollout is their sum. Names become metrics
(`reward/<name>`), so every response must have the same names."""


@runtime_checkable
class Reward(Protocol):
    """Scores one response. A component of group `nemo_rl.rewards`, usually a plain function.

    A reward that holds something, such as a model or a client, is a class. It is created once per run as
    `RewardClass(options)`, with options structured by its `config_class`, and the object is then called like a
    function. A plain function gets the configured options as preset arguments.

    Sync rewards run in a process pool, which kills a call at its deadline. Async rewards run on the event loop of the
    rollouts and must not block it. Either may be called concurrently for other rollouts.

    A reward may have the attributes `conformance`, facts for its kit such as
    `{"examples": [({"prompt": "...", "answer": "..."}, "a response")]}` if it reads columns of its own, and
    `example`, the options to check it with.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Score | Awaitable[Score]:
        """Score one response.

        Arguments are passed by name, as the reward's own signature asks for them. Each is one of `prompt` (str; the
        last message of a conversation), `response` (str), `messages` (the whole conversation, ending with the
        response), `task` (the row), `completion_ids` (the sampled token ids), or a column of the row (`answer`, ...).
        An argument with a default is omitted if no value has its name; `**kwargs` takes every value. An argument
        that no value can fill is a `ConfigError` before the run starts. The reward must not change its arguments.

        Returns:
            The score, in units of the reward's choice; or an awaitable of it.

        Raises:
            Exception: Any exception fails the rollout, which records its stage and message; it never becomes a
                silent zero.
        """
        ...
