"""Prompts on their way to groups: started in data order, put into the buffer when they are done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from attrs import define

if TYPE_CHECKING:
    from nemo_rl_core.data.module import DataModule, TaskItem
    from nemo_rl_core.records.rollout import RolloutGroup
    from nemo_rl_core.rollouts.buffer import GroupBuffer
    from nemo_rl_core.rollouts.runner import RolloutRunner
    from nemo_rl_core.schema import RunConfig

__all__ = ["RolloutPump"]


@define(eq=False)
class _Attempt:
    """One sampling of a prompt's group."""

    item: TaskItem
    version: int | None = None
    """Version of the weights when its first episode started; None while it waits for a place."""
    future: Future[RolloutGroup] | None = None
    abandoned: bool = False

    def start(self, version: int) -> None:
        """Called in the thread of the rollouts."""
        self.version = version


class RolloutPump:
    """Keeps groups under way; a group counts as under way until it was handed to the trainer.

    The trainer's thread calls every method. Groups arrive in the thread of the rollouts, and what went wrong there
    reaches the trainer through the buffer.

    Args:
        data: Where prompts come from.
        runner: Runs the groups.
        buffer: Where they go.
        config: Of the run.
    """

    def __init__(self, *, data: DataModule, runner: RolloutRunner, buffer: GroupBuffer, config: RunConfig) -> None:
        self.data = data
        self.runner = runner
        self.buffer = buffer
        self._group_size = config.group_size
        self._chunk = config.num_items_per_step
        self._attempts: dict[int, _Attempt] = {}
        self._returned: list[TaskItem] = []
        """Prompts to sample before others: those given back or given up, and of a resumed run those that had not
        finished."""
        self._exhausted = False
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Groups under way, finished ones that were not taken included."""
        return len(self._attempts) + len(self._returned)

    def started(self, now: int) -> dict[int, int]:
        """Weight version at which each group under way was started, by its id; `now` for those that wait for places."""
        versions = ((group_id, attempt.version) for group_id, attempt in self._attempts.items())
        return {group_id: now if version is None else version for group_id, version in versions}

    def fill(self, num: int, version: int) -> None:
        """Have `num` groups under way; fewer at the end of the data. New ones are started with weights `version`."""
        room = max(num - len(self._attempts), 0)
        waiting = sorted(self._returned, key=lambda item: item.index)
        items, self._returned = waiting[:room], waiting[room:]
        while (missing := num - len(self._attempts) - len(items)) > 0 and not self._exhausted:
            more = self.data.next(min(missing, self._chunk))
            self._exhausted = more is None
            items += more or ()
        if not items:
            return
        with self.runner.gathering():
            for item in items:
                self._start(item, version)

    def rows(self, num: int) -> list[TaskItem] | None:
        """The next rows of the data themselves, of which nothing is sampled; None at their end."""
        items, self._returned = self._returned[:num], self._returned[num:]
        if len(items) == num:
            return items
        more = self.data.next(num - len(items))
        return None if more is None else items + more

    def restart(self, group_id: int) -> None:
        """Have a group sampled again by a later `fill`; what became of it so far is forgotten."""
        self._returned.append(self._abandon(group_id))

    def drop(self, group_id: int) -> None:
        """Give a group up; it will not be trained on."""
        self._abandon(group_id)
        self.buffer.skip(group_id)

    def taken(self, groups: Sequence[RolloutGroup]) -> None:
        """The trainer has these now."""
        for group in groups:
            del self._attempts[group.group_id]

    def give_back(self, groups: Sequence[RolloutGroup]) -> None:
        """Put back groups that the trainer took but does not need; a later `fill` samples their prompts again."""
        for group in groups:
            self._returned.append(self._attempts.pop(group.group_id).item)
            self.buffer.give_back(group.group_id)

    def mark(self) -> Callable[[], dict[str, Any]]:
        """State between two steps, made when the result is called; see `load_state_dict`."""
        with self._lock:
            buffer = self.buffer.mark()
            items = [*(attempt.item for attempt in self._attempts.values()), *self._returned]
            data = self.data.state_dict()

        def state() -> dict[str, Any]:
            saved = buffer()
            finished = set(saved["group_ids"])
            return {
                "data": data,
                "buffer": saved,
                "finished": [item for item in items if item.index in finished],
                "unfinished": [item for item in items if item.index not in finished],
            }

        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state: finished groups are there, the others are sampled again at the next `fill`."""
        self.data.load_state_dict(state["data"])
        self.buffer.load_state_dict(state["buffer"])
        versions = {group["group_id"]: group["weight_version"] for group in state["buffer"]["groups"]}
        self._attempts = {item.index: _Attempt(item, versions[item.index]) for item in state["finished"]}
        self._returned = list(state["unfinished"])

    def _start(self, item: TaskItem, version: int) -> None:
        attempt = self._attempts[item.index] = _Attempt(item)
        attempt.future = self.runner.submit(
            item.index,
            item.task_id,
            item.task,
            group_size=self._group_size,
            weight_version=version,
            on_start=attempt.start,
        )
        attempt.future.add_done_callback(lambda future: self._arrived(attempt, future))

    def _abandon(self, group_id: int) -> TaskItem:
        with self._lock:
            attempt = self._attempts.pop(group_id)
            attempt.abandoned = True
            self.buffer.remove(group_id)
        if attempt.future is not None:
            attempt.future.cancel()
        return attempt.item

    def _arrived(self, attempt: _Attempt, future: Future[RolloutGroup]) -> None:
        """Called in the thread of the rollouts."""
        with self._lock:
            if attempt.abandoned or future.cancelled():
                return
            try:
                self.buffer.put(future.result())
            except BaseException as error:  # whatever it is, the trainer must not wait for ever
                self.buffer.fail(error)
