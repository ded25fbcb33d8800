"""A bounded buffer of whole groups between the rollout loop and the trainer."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rl_core.errors import CheckpointError, ConfigError, DeadlineExceeded, InvariantViolation
from nemo_rl_core.rollouts.jsonl import group_from_dict, group_to_dict
from nemo_rl_core.rollouts.records import RolloutGroup

__all__ = ["GroupBuffer", "group_age"]


def group_age(group: RolloutGroup, current_version: int) -> int:
    """Optimizer steps by which the oldest token of the group lies behind the current weights."""
    versions = [r.oldest_weight_version for r in group.valid]
    oldest = min((v for v in versions if v is not None), default=group.weight_version)
    return current_version - min(oldest, group.weight_version)


class GroupBuffer:
    """Holds finished groups until the trainer takes them, in the order of their ids.

    A group is handed out once: one that is held or was taken is refused when put again. A group whose
    oldest token lies more than `staleness` optimizer steps behind is never handed out; it is evicted,
    counted, and may be sampled and put again under its id. Thread-safe.

    Args:
        capacity: Groups held at most.
        staleness: Largest age of a group that may be trained on; 0 is on-policy.
    """

    def __init__(self, capacity: int, staleness: int) -> None:
        if capacity < 1 or staleness < 0:
            raise ConfigError(f"A group buffer needs capacity >= 1 and staleness >= 0, got {capacity}, {staleness}.")
        self.capacity = capacity
        self.staleness = staleness
        self.num_evicted = 0
        """Groups evicted as too old so far."""
        self._groups: dict[int, RolloutGroup] = {}
        self._evicted: list[RolloutGroup] = []
        self._taken_below = 0
        self._taken: set[int] = set()
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """Groups held now."""
        with self._changed:
            return len(self._groups)

    @property
    def num_free(self) -> int:
        """Groups that still fit."""
        return self.capacity - len(self)

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
            if not self._changed.wait_for(lambda: self._failure is not None or self._has_room(), timeout_s):
                raise DeadlineExceeded(
                    f"The rollout buffer is full: {len(self._groups)} of {self.capacity} groups, and group "
                    f"{group.group_id} waited {timeout_s:g} s for room. The trainer takes no groups."
                )
            if self._failure is not None:
                raise self._failure
            self._groups[group.group_id] = group
            self._changed.notify_all()

    def take(
        self,
        num_groups: int,
        *,
        current_version: int,
        timeout_s: float,
        waiting_for: Sequence[int] | None = None,
    ) -> list[RolloutGroup]:
        """Hand out groups in the order of their ids, waiting until they are there.

        Args:
            num_groups: How many.
            current_version: Version of the trainer's weights, from which ages are counted.
            timeout_s: How long to wait.
            waiting_for: Ids that are under way or held; the `num_groups` lowest of them are taken, however
                late they arrive. None takes the lowest ids of what is there first.

        Returns:
            `num_groups` groups, by rising id.

        Raises:
            DeadlineExceeded: They did not come in time; names the missing ids.
            InvariantViolation: Too few of `waiting_for` are left, because others were evicted as stale.
            Exception: What `fail` was called with.
        """
        deadline = time.monotonic() + timeout_s
        wanted = None if waiting_for is None else sorted(set(waiting_for))
        if wanted is not None and len(wanted) < num_groups:
            raise InvariantViolation(f"{num_groups} groups are wanted and only {len(wanted)} are under way: {wanted}.")
        with self._changed:
            while True:
                if self._failure is not None:
                    raise self._failure
                self._evict(current_version)
                ids = self._ready(num_groups, wanted)
                if ids is not None:
                    return [self._hand_out(group_id) for group_id in ids]
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeadlineExceeded(self._describe_missing(num_groups, wanted, timeout_s))
                self._changed.wait(left)

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
            self._changed.notify_all()
            return dropped

    # -- resume -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as plain data: groups held and ids already handed out."""
        with self._changed:
            return {
                "groups": [group_to_dict(self._groups[i]) for i in sorted(self._groups)],
                "taken_below": self._taken_below,
                "taken": sorted(self._taken),
                "num_evicted": self.num_evicted,
            }

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
            self._taken_below, self._taken = taken_below, taken
            self.num_evicted = num_evicted
            self._evicted = []
            self._changed.notify_all()

    # -- under the lock ---------------------------------------------------------------------------

    def _evict(self, current_version: int) -> None:
        stale = [i for i, group in self._groups.items() if group_age(group, current_version) > self.staleness]
        for group_id in sorted(stale):
            self._evicted.append(self._groups.pop(group_id))
            self.num_evicted += 1
        if stale:
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return len(self._groups) < self.capacity

    def _ready(self, num_groups: int, wanted: list[int] | None) -> list[int] | None:
        if wanted is None:
            ids = sorted(self._groups)[:num_groups]
            return ids if len(ids) == num_groups else None
        gone = {group.group_id for group in self._evicted} - set(self._groups)
        first = [i for i in wanted if i not in gone][:num_groups]
        if len(first) < num_groups:
            raise InvariantViolation(
                f"Groups {sorted(gone)} are older than the staleness bound of {self.staleness} and were evicted; "
                f"only {len(first)} of the {num_groups} wanted are left. Sample them again (take_evicted)."
            )
        return first if all(i in self._groups for i in first) else None

    def _hand_out(self, group_id: int) -> RolloutGroup:
        group = self._groups.pop(group_id)
        self._taken.add(group_id)
        while self._taken_below in self._taken:
            self._taken.remove(self._taken_below)
            self._taken_below += 1
        self._changed.notify_all()
        return group

    def _describe_missing(self, num_groups: int, wanted: list[int] | None, timeout_s: float) -> str:
        held = sorted(self._groups)
        if wanted is None:
            return f"Waited {timeout_s:g} s for {num_groups} groups of rollouts; {len(held)} are there: {_ids(held)}."
        missing = [i for i in wanted[:num_groups] if i not in self._groups]
        return f"Waited {timeout_s:g} s for rollouts: group {_ids(missing)} did not finish; held: {_ids(held)}."


def _ids(group_ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, group_ids[:16])) or "none"
    return shown if len(group_ids) <= 16 else f"{shown} and {len(group_ids) - 16} more"
