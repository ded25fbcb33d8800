"""Where a step's items come from: rows of a dataset, or groups sampled by the policy."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from nemo_rl_core.errors import ConfigError, InvariantViolation
from nemo_rl_core.registry import PluginCall
from nemo_rl_core.rollouts.buffer import GroupBuffer
from nemo_rl_core.training.failures import check_failures

if TYPE_CHECKING:
    from nemo_rl_core.config.schema import RunConfig
    from nemo_rl_core.data.module import DataModule, TaskItem
    from nemo_rl_core.protocols.algorithm import Algorithm
    from nemo_rl_core.rollouts.records import RolloutGroup
    from nemo_rl_core.rollouts.runner import RolloutRunner

__all__ = ["ExampleFeed", "RolloutFeed"]


class ExampleFeed:
    """Rows, in the data module's order."""

    def __init__(self, data: DataModule, num_items: int) -> None:
        self.data = data
        self.num_items = num_items

    def next(self, version: int) -> list[Any]:
        """The next step's rows. Raises StopIteration at the end of the data."""
        return [item.task for item in self.data.next(self.num_items)]

    def state_dict(self) -> dict[str, Any]:
        """Where the next step begins."""
        return {"data": self.data.state_dict()}

    def load_state_dict(self, state: dict[str, Any], *, version: int = 0) -> None:
        """Continue from `state_dict`."""
        self.data.load_state_dict(state["data"])


class RolloutFeed:
    """Groups of rollouts, through a bounded buffer with a staleness bound.

    Prompts are submitted in data order and groups are taken in that order, whatever order they finish in.
    With staleness 0 a step's prompts are submitted when the step begins; with a bound of k the prompts of up
    to k further steps are already under way.
    """

    def __init__(
        self,
        *,
        data: DataModule,
        runner: RolloutRunner,
        algorithm: Algorithm,
        config: RunConfig,
        max_batches: int = 10,
    ) -> None:
        self.data = data
        self.runner = runner
        self.algorithm = algorithm
        self.config = config
        self.num_prompts = config.num_items_per_step
        self.staleness = config.rollouts.staleness
        self.max_batches = max_batches
        self.discarded = 0
        """Groups that the algorithm refused in the last step."""
        self.all_groups: list[RolloutGroup] = []
        """Every group that finished for the last step, refused ones included."""
        self._buffer = GroupBuffer(
            capacity=self.num_prompts * (self.staleness + 1) * max(2, max_batches), staleness=self.staleness
        )
        self._under_way: dict[int, TaskItem] = {}
        """Prompts submitted whose groups were not taken yet, by group id."""
        self._exhausted = False

    def next(self, version: int) -> list[RolloutGroup]:
        """The groups of one step. Raises StopIteration when the data has ended.

        Raises:
            EnvironmentFailure: Too many rollouts failed; the message counts the errors.
            ConfigError: Dynamic sampling refused every group of too many batches.
        """
        kept: list[RolloutGroup] = []
        self.discarded = 0
        self.all_groups = []
        limit = self.config.rollouts.max_failed_fraction
        for _ in range(self.max_batches):
            missing = self.num_prompts - len(kept)
            self._submit(missing + self.staleness * self.num_prompts, version)
            wanted = min(missing, len(self._under_way))
            if wanted == 0:
                raise StopIteration
            groups = self._take(wanted, version)
            self.all_groups += groups
            check_failures(self.all_groups, limit, warn=False)
            with PluginCall("algorithms", self.algorithm, "keep_group"):
                kept += [group for group in groups if group.valid and self.algorithm.keep_group(group)]
            self.discarded = len(self.all_groups) - len(kept)
            if len(kept) == self.num_prompts:
                check_failures(self.all_groups, limit)
                return kept
        raise ConfigError(
            f"After {self.max_batches} batches of prompts only {len(kept)} of {self.num_prompts} groups can be "
            f"trained on ({self.discarded} were refused, for instance because all their rewards are equal). "
            "Make the tasks easier or harder, sample more generations per prompt, or switch dynamic sampling off."
        )

    def state_dict(self) -> dict[str, Any]:
        """What is needed to begin the next step again: data order, finished groups, prompts under way."""
        buffer = self._buffer.state_dict()
        finished = {group["group_id"] for group in buffer["groups"]}
        return {
            "data": self.data.state_dict(),
            "buffer": buffer,
            "finished": [item for group_id, item in self._under_way.items() if group_id in finished],
            "unfinished": [item for group_id, item in self._under_way.items() if group_id not in finished],
        }

    def load_state_dict(self, state: dict[str, Any], *, version: int = 0) -> None:
        """Continue from `state_dict`; prompts that were under way are sampled again, with weights `version`."""
        self.data.load_state_dict(state["data"])
        self._buffer.load_state_dict(state["buffer"])
        self._under_way = {item.index: item for item in state["finished"]}
        for item in state["unfinished"]:
            self._start(item, version)

    def _submit(self, num: int, version: int) -> None:
        """Have `num` groups finished or under way."""
        missing = num - len(self._under_way)
        if missing <= 0 or self._exhausted:
            return
        items: list[TaskItem] = []
        try:
            items = self.data.next(missing)
        except StopIteration:
            self._exhausted = True
        with self.runner.gathering():
            for item in items:
                self._start(item, version)

    def _start(self, item: TaskItem, version: int) -> None:
        future = self.runner.submit(
            item.index, item.task_id, item.task, group_size=self.config.group_size, weight_version=version
        )
        self._under_way[item.index] = item
        future.add_done_callback(self._arrived)

    def _arrived(self, future: Future[RolloutGroup]) -> None:
        """Called in the rollout thread; whatever went wrong reaches the trainer through the buffer."""
        if future.cancelled():
            return
        try:
            self._buffer.put(future.result())
        except Exception as error:
            self._buffer.fail(error)

    def _take(self, num: int, version: int) -> list[RolloutGroup]:
        """The `num` groups of lowest id; those that became too old are sampled again first."""
        while True:
            try:
                groups = self._buffer.take(
                    num, current_version=version, timeout_s=self._deadline_s(), waiting_for=sorted(self._under_way)
                )
                break
            except InvariantViolation:
                stale = self._buffer.take_evicted()
                if not stale:
                    raise
                for group in stale:
                    self._start(self._under_way[group.group_id], version)
        for group in groups:
            del self._under_way[group.group_id]
        return groups

    def _deadline_s(self) -> float:
        """No group may take longer: every turn at its deadline, for each round of admissions."""
        limits = self.config.rollouts
        rounds = 1 + len(self._under_way) * self.config.group_size // limits.max_in_flight
        one = limits.max_turns * (limits.generation_timeout_s + limits.environment_timeout_s)
        return rounds * (one + 2 * limits.environment_timeout_s)
