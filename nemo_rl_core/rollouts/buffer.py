"""Bounded buffer of whole groups between the rollout loop and the trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_rl_core.errors import CheckpointError, ConfigError, DeadlineExceeded, InvariantViolation
from nemo_rl_core.machine.clock import Clock, SystemClock
from nemo_rl_core.records.jsonl import group_from_dict, group_to_dict
from nemo_rl_core.records.rollout import RolloutGroup

__all__ = ["GroupBuffer", "group_age"]


def group_age(group: RolloutGroup, current_version: int) -> int:
    """Optimizer steps by which the oldest token of the group lies behind the current weights."""
    return current_version - _oldest_version(group)


def _oldest_version(group: RolloutGroup) -> int:
    versions = [r.oldest_weight_version for r in group.valid]
    oldest = min((v for v in versions if v is not None), default=group.weight_version)
    return min(oldest, group.weight_version)


class GroupBuffer:
    """Holds finished groups until the trainer takes them, in the order of their ids.

    A group is handed out once: one that is held or was taken is refused when put again. A group whose
    oldest token lies more than `staleness` optimizer steps behind is never handed out; it is evicted,
    counted, and may be sampled and put again under its id. Thread-safe.

    Args:
        capacity: Groups held at most.
        staleness: Largest age of a group that may be trained on; 0 is on-policy.
        clock: Of the deadlines; None is the machine's.
    """

    def __init__(self, capacity: int, staleness: int, clock: Clock | None = None) -> None:
        if capacity < 1 or staleness < 0:
            raise ConfigError(f"A group buffer needs capacity >= 1 and staleness >= 0, got {capacity}, {staleness}.")
        self.capacity = capacity
        self.staleness = staleness
        self.num_evicted = 0
        """Groups evicted as too old so far."""
        self._groups: dict[int, RolloutGroup] = {}
        self._oldest: dict[int, int] = {}
        """Version of the oldest token of each group held."""
        self._evicted: list[RolloutGroup] = []
        self._taken_below = 0
        self._taken: set[int] = set()
        self._failure: BaseException | None = None
        self._clock = clock or SystemClock()
        self._changed = self._clock.condition()

    def __len__(self) -> int:
        """Groups held now."""
        with self._changed:
            return len(self._groups)

    @property
    def group_ids(self) -> list[int]:
        """Ids of the groups held now, in order."""
        with self._changed:
            return sorted(self._groups)

    def was_taken(self, group_id: int) -> bool:
        """Whether the group has been handed out."""
        with self._changed:
            return group_id < self._taken_below or group_id in self._taken

    def put(self, group: RolloutGroup, *, timeout_s: float = 0.0) -> None:
        """Add a finished group.

        Args:
            group: The group.
            timeout_s: How long to wait for room.

        Raises:
            InvariantViolation: A group of this id is held or was taken already.
            DeadlineExceeded: The buffer is still full after `timeout_s`.
        """
        with self._changed:
            if group.group_id in self._groups or self.was_taken(group.group_id):
                state = "held" if group.group_id in self._groups else "taken"
                raise InvariantViolation(
                    f"Group {group.group_id} was put into the rollout buffer twice (it is {state} already)."
                )
            deadline = self._clock.now() + timeout_s
            while self._failure is None and not self._has_room() and (left := deadline - self._clock.now()) > 0:
                self._changed.wait(left)
            if self._failure is None and not self._has_room():
                raise DeadlineExceeded(
                    f"The rollout buffer is full: {len(self._groups)} of {self.capacity} groups, and group "
                    f"{group.group_id} waited {timeout_s:g} s for room. The trainer takes no groups."
                )
            if self._failure is not None:
                raise self._failure
            self._groups[group.group_id] = group
            self._oldest[group.group_id] = _oldest_version(group)
            self._changed.notify_all()

    def take(
        self,
        num_groups: int,
        *,
        current_version: int,
        timeout_s: float,
        waiting_for: Sequence[int] | None = None,
        started: Mapping[int, int] | None = None,
        num_per_step: int | None = None,
    ) -> list[RolloutGroup]:
        """Hand out groups in the order of their ids, waiting until they are there.

        With `started`, whatever is there first is taken, the oldest before others, whether or not those of lower id
        have finished. With `num_per_step` too, the wait goes on until what would be left could still be trained within
        the bound: for each k, no more than k * `num_per_step` groups may become too old in the k steps that follow.
        When all have finished there is nothing to wait for.

        Args:
            num_groups: How many.
            current_version: Version of the trainer's weights, from which ages are counted.
            timeout_s: How long to wait.
            waiting_for: Ids that are under way or held; the `num_groups` lowest of them are taken, however
                late they arrive. None takes the lowest ids of what is there first.
            started: Instead of `waiting_for`: weight version at which each group under way or held was started.
            num_per_step: Groups that each later step takes at least; None lets groups become too old.

        Returns:
            `num_groups` groups, by rising id.

        Raises:
            DeadlineExceeded: They did not come in time; names the missing ids.
            InvariantViolation: Some of `waiting_for` or `started` were evicted as stale; see `take_evicted`.
            Exception: What `fail` was called with.
        """
        deadline = self._clock.now() + timeout_s
        wanted = None if waiting_for is None else sorted(set(waiting_for))
        if wanted is not None and len(wanted) < num_groups:
            raise InvariantViolation(f"{num_groups} groups are wanted and only {len(wanted)} are under way: {wanted}.")
        with self._changed:
            while True:
                if self._failure is not None:
                    raise self._failure
                self._evict(current_version)
                if self._evicted and (wanted is not None or started is not None):
                    raise InvariantViolation(self._describe_evicted(current_version))
                if started is None:
                    ids = self._ready(num_groups, wanted)
                else:
                    ids = self._ready_first(num_groups, started, current_version, num_per_step)
                if ids is not None:
                    return [self._hand_out(group_id) for group_id in ids]
                left = deadline - self._clock.now()
                if left <= 0:
                    raise DeadlineExceeded(self._describe_missing(num_groups, wanted, timeout_s, started))
                self._changed.wait(left)

    def remove(self, group_id: int) -> None:
        """Forget a group that is held, if it is; it may be put again."""
        with self._changed:
            self._groups.pop(group_id, None)
            self._oldest.pop(group_id, None)
            self._changed.notify_all()

    def skip(self, group_id: int) -> None:
        """The group will not come: from now on it counts as handed out, and is refused when put."""
        with self._changed:
            self.remove(group_id)
            self._mark_taken(group_id)
            self._changed.notify_all()

    def give_back(self, group_id: int) -> None:
        """A group that was handed out is not used: it may be sampled and put again."""
        with self._changed:
            if group_id < self._taken_below:
                self._taken.update(range(group_id, self._taken_below))
                self._taken_below = group_id
            self._taken.remove(group_id)

    def take_evicted(self) -> list[RolloutGroup]:
        """Groups evicted as stale since the last call, so that they can be sampled again."""
        with self._changed:
            evicted, self._evicted = self._evicted, []
            return evicted

    def fail(self, error: BaseException) -> None:
        """Raise `error` in everyone who waits, now and later."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def clear(self) -> list[RolloutGroup]:
        """Drop and return every group held; their ids may be put again."""
        with self._changed:
            dropped = [self._groups[i] for i in sorted(self._groups)]
            self._groups.clear()
            self._oldest.clear()
            self._changed.notify_all()
            return dropped

    # -- resume -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as plain data: groups held and ids already handed out."""
        return self.mark()()

    def mark(self) -> Callable[[], dict[str, Any]]:
        """Return a function that makes what `state_dict` would return now; groups no longer change."""
        with self._changed:
            groups = [self._groups[i] for i in sorted(self._groups)]
            rest = {
                "group_ids": sorted(self._groups),
                "taken_below": self._taken_below,
                "taken": sorted(self._taken),
                "num_evicted": self.num_evicted,
            }
        return lambda: {"groups": [group_to_dict(group) for group in groups], **rest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of another buffer.

        Raises:
            CheckpointError: The state is not one of a buffer.
        """
        try:
            groups = {group.group_id: group for group in map(group_from_dict, state["groups"])}
            taken_below, taken = int(state["taken_below"]), set(state["taken"])
            num_evicted = int(state["num_evicted"])
        except (KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"The saved rollout buffer cannot be read: {what}.") from error
        with self._changed:
            self._groups = groups
            self._oldest = {i: _oldest_version(group) for i, group in groups.items()}
            self._taken_below, self._taken = taken_below, taken
            self.num_evicted = num_evicted
            self._evicted = []
            self._changed.notify_all()

    # -- under the lock ---------------------------------------------------------------------------

    def _evict(self, current_version: int) -> None:
        stale = [i for i, oldest in self._oldest.items() if current_version - oldest > self.staleness]
        for group_id in sorted(stale):
            self._evicted.append(self._groups.pop(group_id))
            del self._oldest[group_id]
            self.num_evicted += 1
        if stale:
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return len(self._groups) < self.capacity

    def _ready(self, num_groups: int, wanted: list[int] | None) -> list[int] | None:
        if wanted is None:
            ids = sorted(self._groups)[:num_groups]
            return ids if len(ids) == num_groups else None
        first = wanted[:num_groups]
        return first if all(i in self._groups for i in first) else None

    def _ready_first(
        self, num_groups: int, started: Mapping[int, int], current_version: int, num_per_step: int | None
    ) -> list[int] | None:
        """The oldest groups held, by rising id, if they are enough; see `take`."""
        if len(self._groups) < num_groups:
            return None
        chosen = sorted(self._groups, key=lambda i: (self._oldest[i], i))[:num_groups]
        more_will_come = not started.keys() <= self._groups.keys()
        if num_per_step is not None and more_will_come:
            left = Counter(started[i] for i in started.keys() - set(chosen))
            waiting = 0
            for version in sorted(left):
                waiting += left[version]
                if waiting > (version + self.staleness - current_version) * num_per_step:
                    return None
        return sorted(chosen)

    def _hand_out(self, group_id: int) -> RolloutGroup:
        group = self._groups.pop(group_id)
        del self._oldest[group_id]
        self._mark_taken(group_id)
        self._changed.notify_all()
        return group

    def _mark_taken(self, group_id: int) -> None:
        self._taken.add(group_id)
        while self._taken_below in self._taken:
            self._taken.remove(self._taken_below)
            self._taken_below += 1

    def _describe_evicted(self, current_version: int) -> str:
        listing = ", ".join(f"{g.group_id} (sampled by {_oldest_version(g)})" for g in self._evicted[:16])
        return (
            f"Groups {listing} are older than the staleness bound of {self.staleness} at weight version "
            f"{current_version} and were evicted. Sample them again (take_evicted); if they were just sampled, the "
            "engine does not stamp its completions with the version that update_weights gave it."
        )

    def _describe_missing(
        self, num_groups: int, wanted: list[int] | None, timeout_s: float, started: Mapping[int, int] | None
    ) -> str:
        held = sorted(self._groups)
        if started is not None:
            missing = sorted(started.keys() - self._groups.keys())
            return (
                f"Waited {timeout_s:g} s for {num_groups} groups of rollouts: group {_ids(missing)} did not finish; "
                f"held: {_ids(held)}."
            )
        if wanted is None:
            return f"Waited {timeout_s:g} s for {num_groups} groups of rollouts; {len(held)} are there: {_ids(held)}."
        missing = [i for i in wanted[:num_groups] if i not in self._groups]
        return f"Waited {timeout_s:g} s for rollouts: group {_ids(missing)} did not finish; held: {_ids(held)}."


def _ids(group_ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, group_ids[:16])) or "none"
    return shown if len(group_ids) <= 16 else f"{shown} and {len(group_ids) - 16} more"
