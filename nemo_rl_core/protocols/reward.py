"""Contract of a reward: called with what it asks for by name, answers a number or several by name."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, Protocol, runtime_checkable

__all__ = ["Reward", "Score"]

Score = float | Mapping[str, float]
"""One finite number, or finite numbers by name; names become metrics (`reward/<name>`), so they are the same whatever
the response. The total of a rollout is their sum."""


@runtime_checkable
class Reward(Protocol):
    """Scores one response. A component of group `nemo_rl.rewards`, usually a plain function.

    A reward that holds something (a model, a client) is a class: it is made once per run as `RewardClass(options)`, the
    options structured by its `config_class`, and the object is then called as a function is. A plain function gets the
    options of the configuration as preset arguments.

    Sync rewards run in a process pool, where one that does not answer is killed at its deadline; async ones run on the
    event loop of the rollouts and must not block it. Either may be called at the same time for other rollouts.

    A reward may have the attribute `conformance`, what its kit should know, such as
    `{"examples": [({"prompt": "...", "answer": "..."}, "a response")]}` where it reads columns of its own, and
    `example`, the options to check it with.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Score | Awaitable[Score]:
        """Score one response.

        The arguments are those of the reward's own signature, passed by name. Each is one of `prompt` (str, of a
        conversation the last message), `response` (str), `messages` (the whole conversation, the response its last
        message), `task` (the row), `completion_ids` (the sampled token ids), or a column of the row (`answer`, ...).
        One with a default is left out where there is nothing of its name; `**kwargs` takes all there is. An argument
        that nothing can fill is a `ConfigError` before the run starts. None may be changed.

        Returns:
            The score, in the units of the reward's author; or an awaitable of it.

        Raises:
            Exception: Any is an error of that rollout, never a silent zero; its stage and message are recorded.
        """
        ...
