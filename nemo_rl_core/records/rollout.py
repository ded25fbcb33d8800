"""Records of sampling: turn, rollout, group.

Token in, token out: a turn of the policy carries the token ids and logprobs that the engine sampled;
text is never re-tokenised to train.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from attrs import define, field, frozen

from nemo_rl_core.records.completion import FinishReason
from nemo_rl_core.records.message import Message

__all__ = ["Rollout", "RolloutError", "RolloutGroup", "Turn"]


@define(kw_only=True)
class Turn:
    """Consecutive tokens of one origin in a training sequence."""

    message: Message
    token_ids: list[int]
    """The tokens this turn adds to the sequence (template tokens included)."""
    sampled: bool
    """True for what the policy sampled (trained), False for prompts and answers of the environment."""
    logprobs: list[float] = field(factory=list)
    """For a sampled turn, one per token, under the sampling distribution; else empty."""
    finish_reason: FinishReason | None = None
    weight_version: int | None = None
    last_weight_version: int | None = None


@frozen(kw_only=True)
class RolloutError:
    """Why a rollout failed; recorded, counted, never a silent zero reward."""

    stage: Literal["reset", "generate", "step", "score", "close"]
    type: str
    message: str
    origin: str | None = None
    """Origin of the error, such as `plugin maze 1.2 (dist acme-maze), environment step`; None if that is the core."""


@define(kw_only=True)
class Rollout:
    """One attempt at one prompt.

    `segments` holds one list of turns per training sequence: one, unless a turn broke the prefix (a
    template that rewrites history), which forks a new sequence that holds the rewritten history.
    """

    rollout_id: str
    """`<task id>/<index in group>`."""
    task_id: str
    index: int
    """Position in the group, 0-based."""
    seed: int
    task: Mapping[str, Any] = field(factory=dict)
    segments: list[list[Turn]] = field(factory=list)
    rewards: dict[str, float] = field(factory=dict)
    """By name, summed over the steps of the episode."""
    terminated: bool = False
    truncated: bool = False
    """Cut off: the last turn hit its length limit, the turn limit or the context."""
    error: RolloutError | None = None
    info: dict[str, Any] = field(factory=dict)
    timing_s: dict[str, float] = field(factory=dict)
    """Seconds by stage: generation, environment, queue, total."""

    @property
    def reward(self) -> float:
        """The sum of all named rewards."""
        return sum(self.rewards.values())

    @property
    def failed(self) -> bool:
        """Whether it ended in an error and so carries no reward."""
        return self.error is not None

    @property
    def messages(self) -> list[Message]:
        """The conversation of the last segment."""
        return [turn.message for turn in self.segments[-1]] if self.segments else []

    @property
    def response(self) -> str:
        """Text of the last sampled turn; empty if there is none."""
        for turn in reversed(self.segments[-1] if self.segments else []):
            if turn.sampled:
                return str(turn.message.get("content", ""))
        return ""

    @property
    def num_sampled_tokens(self) -> int:
        """Tokens the policy sampled in all segments."""
        return sum(len(t.token_ids) for s in self.segments for t in s if t.sampled)

    @property
    def oldest_weight_version(self) -> int | None:
        """Smallest weight version among the sampled turns."""
        versions = [t.weight_version for s in self.segments for t in s if t.weight_version is not None]
        return min(versions, default=None)

    @property
    def num_weight_versions(self) -> int:
        """Number of weight versions that sampled it, from the first to the last; 0 if nothing was sampled."""
        turns = [t for s in self.segments for t in s if t.weight_version is not None]
        if not turns:
            return 0
        first = min(t.weight_version or 0 for t in turns)
        return max(max(t.weight_version or 0, t.last_weight_version or 0) for t in turns) - first + 1


@define(kw_only=True)
class RolloutGroup:
    """The rollouts of one prompt, by id (never by equal tokens), ordered by index."""

    group_id: int
    """Sequence number of the prompt in the run's data order: groups are trained in this order."""
    task_id: str
    rollouts: list[Rollout] = field(factory=list)
    weight_version: int = 0
    """Version of the weights when the group was started."""

    @property
    def valid(self) -> list[Rollout]:
        """The rollouts that did not fail."""
        return [r for r in self.rollouts if not r.failed]

    @property
    def rewards(self) -> list[float]:
        """Total rewards of the valid rollouts."""
        return [r.reward for r in self.valid]
