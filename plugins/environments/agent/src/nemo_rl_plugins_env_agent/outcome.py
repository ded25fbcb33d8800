"""Outcome that an agent reports: rewards, or an answer to score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

from nemo_rl_core.errors import RewardError

__all__ = ["Outcome", "outcome_of"]

_FIELDS = ("answer", "info", "reward", "rewards", "truncated")


@frozen(kw_only=True)
class Outcome:
    """The end of a run."""

    rewards: Mapping[str, Any] = field(factory=dict)
    answer: str | None = None
    """To be scored by the environment's reward."""
    info: Mapping[str, Any] = field(factory=dict)
    truncated: bool = False


def outcome_of(value: object, agent: str) -> Outcome:
    """Read what an agent returned.

    Args:
        value: A number is the reward, a text the answer. A mapping has some of `reward`, `rewards`, `answer`, `info`
            and `truncated`; with other keys alone it is the rewards by name.
        agent: How messages call it.

    Raises:
        RewardError: It is none of these.
    """
    if isinstance(value, str):
        return Outcome(answer=value)
    if isinstance(value, Mapping):
        if not set(value) & set(_FIELDS):
            return Outcome(rewards=value)
        if unknown := sorted(str(key) for key in value if key not in _FIELDS):
            raise RewardError(
                f"The agent {agent} returned {', '.join(unknown)} beside {', '.join(_FIELDS)}. Put rewards into "
                "`rewards` and everything else into `info`."
            )
        rewards = dict(value.get("rewards") or {})
        if value.get("reward") is not None:
            rewards["reward"] = value["reward"]
        answer = value.get("answer")
        return Outcome(
            rewards=rewards,
            answer=None if answer is None else str(answer),
            info=value.get("info") or {},
            truncated=bool(value.get("truncated")),
        )
    if hasattr(value, "__float__"):
        return Outcome(rewards={"reward": value})
    raise RewardError(
        f"The agent {agent} returned {type(value).__name__} ({value!r:.80}). Return the reward as a number, rewards by "
        "name, or the answer as text."
    )
