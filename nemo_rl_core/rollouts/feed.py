"""Feed of the run loop with groups that the policy samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from nemo_rl_core.errors import ConfigError, InvariantViolation
from nemo_rl_core.machine.clock import Clock, SystemClock
from nemo_rl_core.registry import PluginCall
from nemo_rl_core.rollouts.buffer import GroupBuffer, group_age
from nemo_rl_core.rollouts.failures import check_failures
from nemo_rl_core.rollouts.pump import RolloutPump

if TYPE_CHECKING:
    from nemo_rl_core.data.module import DataModule
    from nemo_rl_core.protocols.algorithm import Algorithm
    from nemo_rl_core.records.rollout import RolloutGroup
    from nemo_rl_core.rollouts.runner import RolloutRunner
    from nemo_rl_core.schema import RunConfig

__all__ = ["RolloutFeed"]


class RolloutFeed:
    """Groups of rollouts, through a bounded buffer with a staleness bound.

    Prompts are started in data order. With a bound of 0, the prompts of a step are started when it begins. With a bound
    of k, those of the next k steps are under way too; more could not be trained on within the bound.

    Args:
        data: Where prompts come from.
        runner: Runs the groups.
        algorithm: May refuse a group (`keep_group`), for which others are then sampled.
        config: Of the run.
        max_batches: Times the prompts of a step that may be sampled for one.
        last_step: Steps of the run; nothing is sampled for later ones. None if that is not known.
        clock: Of waits and deadlines; None is the machine's.
    """

    def __init__(
        self,
        *,
        data: DataModule,
        runner: RolloutRunner,
        algorithm: Algorithm,
        config: RunConfig,
        max_batches: int = 10,
        last_step: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.config = config
        self.num_prompts = config.num_items_per_step
        self.staleness = config.rollouts.staleness
        self.max_batches = max_batches
        self.last_step = last_step
        self.discarded = 0
        """Groups that the algorithm refused in the last step."""
        self.all_groups: list[RolloutGroup] = []
        """Every group that finished for the last step, refused ones included."""
        self._clock = clock or SystemClock()
        self._buffer = GroupBuffer(
            capacity=self.num_prompts * (self.staleness + 1) * max(2, max_batches),
            staleness=self.staleness,
            clock=self._clock,
        )
        self._pump = RolloutPump(data=data, runner=runner, buffer=self._buffer, config=config)
        self._dropped = self._resampled = 0
        self._idle_s = 0.0
        self._measured = self._clock.now()

    def next(self, version: int) -> list[RolloutGroup] | None:
        """The groups of one step; None when the data has ended.

        Args:
            version: Of the trainer's weights: the number of steps done.

        Raises:
            EnvironmentFailure: Too many rollouts failed; the message counts the errors.
            ConfigError: Dynamic sampling refused every group of too many batches.
            DeadlineExceeded: Groups did not finish within the deadlines of their turns; names them.
        """
        kept: list[RolloutGroup] = []
        self.discarded = num_sampled = 0
        self.all_groups = []
        limit = self.config.rollouts.max_failed_fraction
        while (left := self.max_batches * self.num_prompts - num_sampled) > 0:
            groups = self._take(min(self._to_ask_for(len(kept)), left), version)
            if not groups:
                return None
            num_sampled += len(groups)
            check_failures([*self.all_groups, *groups], limit, warn=False)
            with PluginCall("algorithms", self.algorithm, "keep_group"):
                good = [group for group in groups if group.valid and self.algorithm.keep_group(group)]
            missing = self.num_prompts - len(kept)
            spare = {group.group_id for group in good[missing:]}
            used = [group for group in groups if group.group_id not in spare]
            self._pump.give_back(good[missing:])
            self._pump.taken(used)
            self.all_groups += used
            kept += good[:missing]
            self.discarded = len(self.all_groups) - len(kept)
            if len(kept) == self.num_prompts:
                check_failures(self.all_groups, limit)
                return kept
        raise ConfigError(
            f"Of {num_sampled} groups, {self.max_batches} times what a step needs, only {len(kept)} of "
            f"{self.num_prompts} can be trained on ({self.discarded} were refused, for instance because all their "
            "rewards are equal). Make the tasks easier or harder, sample more generations per prompt, or switch "
            "dynamic sampling off."
        )

    def rows(self) -> list[Any] | None:
        """The rows of one step, in place of groups; None when the data has ended."""
        self.discarded = 0
        self.all_groups = []
        items = self._pump.rows(self.num_prompts)
        return None if items is None else [item.task for item in items]

    def start(self, version: int) -> None:
        """Start the prompts that may be sampled with new weights, before the trainer asks; no-op with a bound of 0."""
        if self.staleness > 0 and (self.last_step is None or version < self.last_step):
            self._give_up(self._overdue(version))
            self._pump.fill(self._wanted(self.num_prompts, version), version)

    def metrics(self, version: int) -> dict[str, float]:
        """Return metrics of how the last step's groups were sampled; called once a step.

        Args:
            version: Of the weights that they were trained on.

        Returns:
            `async/age_mean, age_max` (steps by which the oldest token of a group was behind); `carried_over_fraction`
            of its rollouts were sampled by more than one version; `buffer_groups` finished and `in_flight_groups`
            not, when the step ends; `dropped_groups, resampled_groups` too old; `trainer_idle_s` waited for groups
            or, `update_wait_s` of it, for the engine's requests to end before a weight update; `engine_idle_s` without
            any request; idle times also as `_fraction` of the time since the last call.
        """
        now = self._clock.now()
        seconds, self._measured = max(now - self._measured, 1e-9), now
        traffic = self._pump.runner.engine.traffic
        engine_idle_s, update_wait_s = traffic.take_idle_s(), traffic.take_stopping_s()
        trainer_idle_s, self._idle_s = self._idle_s + update_wait_s, 0.0
        ages = [group_age(group, version) for group in self.all_groups]
        rollouts = [rollout for group in self.all_groups for rollout in group.valid]
        held = len(self._buffer)
        metrics = {
            "carried_over_fraction": sum(r.num_weight_versions > 1 for r in rollouts) / max(len(rollouts), 1),
            "buffer_groups": float(held),
            "in_flight_groups": float(len(self._pump) - held),
            "dropped_groups": float(self._dropped),
            "resampled_groups": float(self._resampled),
            "trainer_idle_s": trainer_idle_s,
            "trainer_idle_fraction": trainer_idle_s / seconds,
            "update_wait_s": update_wait_s,
            "engine_idle_s": engine_idle_s,
            "engine_idle_fraction": engine_idle_s / seconds,
        }
        if ages:
            metrics.update(age_mean=sum(ages) / len(ages), age_max=float(max(ages)))
        self._dropped = self._resampled = 0
        return {f"async/{name}": value for name, value in metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state at the start of the next step: data order, finished groups, prompts under way."""
        return self.mark()()

    def mark(self) -> Callable[[], dict[str, Any]]:
        """Return a function that makes what `state_dict` would return now."""
        return self._pump.mark()

    def load_state_dict(self, state: dict[str, Any], *, version: int = 0) -> None:
        """Continue from `state_dict`; prompts that were under way are sampled again by the next step."""
        self._pump.load_state_dict(state)

    def _to_ask_for(self, num_kept: int) -> int:
        """Groups to sample in place of refused ones.

        With a bound of 0 as many as the share kept so far leaves the missing ones of, so that few rounds are waited
        for; above it those of later steps are under way already.
        """
        missing = self.num_prompts - num_kept
        if self.staleness > 0 or num_kept == 0:
            return missing
        return min(math.ceil(missing * len(self.all_groups) / num_kept), self.num_prompts)

    def _wanted(self, missing: int, version: int) -> int:
        """Groups that may be under way: those of this step, and of the steps that the bound lets them reach."""
        ahead = self.staleness if self.last_step is None else min(self.staleness, max(self.last_step - version - 1, 0))
        return missing + ahead * self.num_prompts

    def _take(self, missing: int, version: int) -> list[RolloutGroup]:
        """`missing` groups for this step (fewer at the end of the data); what is too old is given up first."""
        self._give_up(self._overdue(version))
        again: set[int] = set()
        while True:
            self._pump.fill(self._wanted(missing, version), version)
            num = min(missing, len(self._pump))
            if num == 0:
                return []
            try:
                groups = self._wait_for(num, version)
            except InvariantViolation:
                evicted = {group.group_id for group in self._buffer.take_evicted()}
                if not evicted or evicted & again:  # sampled with the newest weights, and too old all the same
                    raise
                self._give_up(evicted)
                again |= evicted
                continue
            return groups

    def _wait_for(self, num: int, version: int) -> list[RolloutGroup]:
        started, rollouts = self._pump.started(version), self.config.rollouts
        began = self._clock.now()
        try:
            if rollouts.order == "data":
                return self._buffer.take(
                    num, current_version=version, timeout_s=self._deadline_s(), waiting_for=sorted(started)
                )
            return self._buffer.take(
                num,
                current_version=version,
                timeout_s=self._deadline_s(),
                started=started,
                num_per_step=self.num_prompts if rollouts.too_old == "wait" else None,
            )
        finally:
            self._idle_s += self._clock.now() - began

    def _overdue(self, version: int) -> list[int]:
        """Groups that were started too long ago to be trained on, however soon they finish."""
        return [i for i, started in self._pump.started(version).items() if version - started > self.staleness]

    def _give_up(self, group_ids: Iterable[int]) -> None:
        for group_id in sorted(group_ids):
            if self.config.rollouts.too_old == "drop":
                self._pump.drop(group_id)
                self._dropped += 1
            else:
                self._pump.restart(group_id)
                self._resampled += 1

    def _deadline_s(self) -> float:
        """No group may take longer: every turn at its deadline, for each round of admissions."""
        limits = self.config.rollouts
        rounds = 1 + len(self._pump) * self.config.group_size // limits.max_in_flight
        one = limits.max_turns * (limits.generation_timeout_s + limits.environment_timeout_s)
        return rounds * (one + 2 * limits.environment_timeout_s)
