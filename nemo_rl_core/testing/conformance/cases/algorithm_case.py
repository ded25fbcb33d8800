"""Case for an algorithm's contract: a tiny configuration, rows and a reward, and hand-made groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import field, frozen
from torch import Tensor

from nemo_rl_core.models.numerics.over_vocabulary import OutputLayer
from nemo_rl_core.protocols.algorithm import Algorithm
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.records.rollout import Rollout, RolloutError, RolloutGroup, Turn
from nemo_rl_core.records.shared_value import Movable, SharedValue

if TYPE_CHECKING:
    from nemo_rl_core.rollouts.context import EnvironmentFactory

__all__ = ["ADDITIONS", "AlgorithmCase", "StandIn", "digits", "handmade_groups", "is_sampled"]

ADDITIONS: Sequence[Mapping[str, str]] = tuple(
    {"prompt": f"{a}+{b}=", "answer": str(a + b), "response": str(a + b)} for a in range(5) for b in range(5)
)
"""Rows for either feed."""

_FIRST_SAMPLED = 50


async def digits(response: str) -> float:
    """Return 1 if the response has a digit: an untrained model writes one now and then, and soon learns to."""
    return float(any(character.isdigit() for character in response))


@frozen(kw_only=True)
class AlgorithmCase:
    """An algorithm and the settings of a run that takes seconds."""

    component: type[Algorithm]
    """The class."""
    config: Mapping[str, Any] = field(factory=dict)
    """Fields of its configuration that make a step small, or choose what is tested; merged over the kit's own."""
    rows: Sequence[Mapping[str, Any]] = ADDITIONS
    """Training data; for an algorithm fed with examples also what its batches are built from."""
    reward: Callable[..., Any] = digits
    """Scores a response, for an algorithm fed with rollouts."""
    environment: EnvironmentFactory | type | None = None
    """In place of the reward."""
    target: Callable[[Mapping[str, Any]], str] | None = lambda row: str(row["response"])
    """Text that a row trains, for an algorithm fed with examples that makes one sequence of each row; None leaves
    that unchecked."""
    teaches_end: bool = True
    """Whether each row also trains the token that ends a sequence."""


@frozen
class StandIn:
    """A `Model` without weights, for batches that are looked at and not trained on.

    Args:
        below: Its logprobs lie this much under those of the engine (or under -1 where there was none).
    """

    below: float

    def logprobs(self, batch: BatchedDataDict) -> Tensor:
        """[N] float32 logprobs in nats: those of the engine minus `below` on trained tokens."""
        mask: Tensor = batch["loss_mask"].float()
        sampled: Tensor = batch["rollout_logprobs"] if "rollout_logprobs" in batch else -mask  # noqa: SIM401
        return sampled - self.below * mask

    def values(self, batch: BatchedDataDict) -> Tensor:
        """[N] float32: 0.5 everywhere."""
        return torch.full((batch.num_tokens,), 0.5)

    def top_logprobs(self, batch: BatchedDataDict, k: int) -> tuple[Tensor, Tensor]:
        """[N, k] token ids 0 to k - 1, and [N, k] float32 logprobs that fall from -1 to -k."""
        ids = torch.arange(k).expand(batch.num_tokens, k)
        return ids, -(ids + 1).float()

    def hidden_states(self, batch: BatchedDataDict) -> Tensor:
        """[N, 4] float32 ones."""
        return torch.ones(batch.num_tokens, 4)

    def output_layer(self) -> OutputLayer:
        """Return a layer of the kit's vocabulary that has the same numbers each time."""
        return OutputLayer(weight=torch.linspace(-1, 1, 104 * 4).view(104, 4))

    def keep(self, value: Movable) -> SharedValue:
        """Return a handle of the value, which stays in this process."""
        return SharedValue(value)


def is_sampled(token_id: int) -> bool:
    """Whether a token of `handmade_groups` was sampled by the policy."""
    return token_id >= _FIRST_SAMPLED


def handmade_groups(sizes: Sequence[int] = (4, 4, 4, 1)) -> list[RolloutGroup]:
    """Groups of rollouts of one and two turns, of which some failed and one was cut off.

    Sampled tokens have ids of 50 and more and a logprob of -id / 100; the first token of a sequence is its group's
    id, the second its rollout's index in the group. The rewards of the second group do not vary.
    """
    return [_group(number, size) for number, size in enumerate(sizes)]


def _group(number: int, size: int) -> RolloutGroup:
    rollouts = [_rollout(number, index) for index in range(size)]
    if size > 3:
        rollouts[1].error = RolloutError(stage="score", type="ValueError", message="no such answer")
        rollouts[1].rewards = {}
    return RolloutGroup(group_id=3 + number, task_id=f"task-{number}", rollouts=rollouts)


def _rollout(group: int, index: int) -> Rollout:
    said = [_FIRST_SAMPLED + (7 * group + 5 * index + i) % 40 for i in range(2 + (group + index) % 3)]
    turns = [_given([3 + group, 20 + index, 30]), _sampled(said[:1]), _given([31, 32]), _sampled(said[1:])]
    if index % 2 == 0:
        turns = [_given([3 + group, 20 + index, 30, 33]), _sampled(said)]
    reward = 1.0 if group == 1 else float(index % 3)
    return Rollout(
        rollout_id=f"task-{group}/{index}",
        task_id=f"task-{group}",
        index=index,
        seed=index,
        task={"prompt": "?"},
        segments=[turns],
        rewards={"score": reward},
        terminated=index != 2,
        truncated=index == 2,
    )


def _given(token_ids: list[int]) -> Turn:
    return Turn(message={"role": "user", "content": "?"}, token_ids=token_ids, sampled=False)


def _sampled(token_ids: list[int]) -> Turn:
    return Turn(
        message={"role": "assistant", "content": "!"},
        token_ids=token_ids,
        sampled=True,
        logprobs=[-token / 100 for token in token_ids],
        finish_reason="stop",
        weight_version=0,
        last_weight_version=0,
    )
