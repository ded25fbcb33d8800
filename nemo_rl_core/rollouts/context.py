"""Tools that the rollout engine gives to the environment of one episode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from nemo_rl_core.machine.task_deadlines import TaskDeadline
from nemo_rl_core.protocols.environment import Environment, EnvironmentContext
from nemo_rl_core.rollouts.scoring.process_pool import ProcessPool

__all__ = ["EnvironmentFactory", "EpisodeContext"]

_R = TypeVar("_R")

EnvironmentFactory = Callable[[EnvironmentContext], Environment]
"""Makes the environment of one episode; called once per rollout, so keep it cheap."""


class EpisodeContext:
    """The `EnvironmentContext` of one episode.

    A call in the pool has its own deadline (and its time in the queue none), so the deadline of the
    step that makes it is suspended meanwhile.

    Attributes:
        completion_ids: Tokens of the message that is being answered.
        reward_timeout_s: Deadline of one scoring call.
    """

    __slots__ = ("_pool", "completion_ids", "deadline", "reward_timeout_s")

    def __init__(self, pool: ProcessPool, *, reward_timeout_s: float) -> None:
        self._pool = pool
        self.reward_timeout_s = reward_timeout_s
        self.completion_ids: list[int] = []
        self.deadline: TaskDeadline | None = None
        """Deadline of the step under way, set by the engine."""

    def can_run_in_pool(self, function: Callable[..., object]) -> bool:
        """Return whether `function` can be sent to a worker process."""
        return self._pool.can_ship(function)

    async def run_in_pool(
        self, function: Callable[..., _R], *args: object, timeout_s: float | None = None, **kwargs: object
    ) -> _R:
        """Run a picklable function in a worker process; see `ProcessPool.run`."""
        budget = self.reward_timeout_s if timeout_s is None else timeout_s
        deadline = self.deadline
        if deadline is None:
            return await self._pool.run(function, *args, timeout_s=budget, **kwargs)
        left = deadline.pause()
        try:
            return await self._pool.run(function, *args, timeout_s=budget, **kwargs)
        finally:
            deadline.resume(left)
