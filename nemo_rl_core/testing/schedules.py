"""Random schedules: cluster, faults and deaths drawn from a seed, and the invariants that hold in all of them."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from attrs import define, evolve, field, frozen

from nemo_rl_core.errors import ConfigError, DeadlineExceeded, EnvironmentFailure, NemoRLError
from nemo_rl_core.planning.simulation.clock import SimulatedKill
from nemo_rl_core.planning.simulation.parts import SimulatedStore
from nemo_rl_core.planning.simulation.run import SimulatedRun
from nemo_rl_core.planning.simulation.spec import EngineSpec, Faults, ResponseLengths, SimulatedCluster
from nemo_rl_core.records.rollout import RolloutGroup
from nemo_rl_core.records.run_state import RunState
from nemo_rl_core.registry import RunHooks
from nemo_rl_core.rollouts.feed import RolloutFeed
from nemo_rl_core.schema import RolloutConfig

__all__ = ["ScheduleReport", "draw_cluster", "run_schedule"]

_MAX_LIVES = 6
_EXPECTED = ("simulated: ", "passed its deadline")
"""What the error of a rollout that failed by a drawn fault says."""


def draw_cluster(seed: int) -> SimulatedCluster:
    """Draw a small cluster with faults."""
    rng = random.Random(seed)
    staleness = rng.choice((0, 1, 1, 2, 4))
    faulty = rng.random() < 0.75

    def chance(most: float) -> float:
        return rng.uniform(0, most) if faulty and rng.random() < 0.5 else 0.0

    return SimulatedCluster(
        num_steps=rng.randint(2, 7),
        num_prompts=rng.randint(1, 4),
        group_size=rng.randint(1, 2),
        num_turns=rng.choice((1, 1, 3)),
        rollouts=RolloutConfig(
            max_turns=4,
            max_in_flight=rng.choice((1, 3, 1024)),
            staleness=staleness,
            order=rng.choice(("data", "ready_first")),
            too_old=rng.choice(("wait", "resample", "drop")),
            weight_updates=rng.choice((None, "between")),
            generation_timeout_s=60.0,
            environment_timeout_s=40.0,
            max_failed_fraction=1.0,
        ),
        engine=EngineSpec(
            num_engines=rng.randint(1, 3),
            max_batch=rng.randint(1, 8),
            tokens_per_s=rng.uniform(5, 50),
            sequence_tokens_per_s=rng.uniform(5, 30),
            request_s=rng.choice((0.0, rng.uniform(0, 0.5))),
            in_flight_updates=rng.random() < 0.6,
        ),
        lengths=ResponseLengths(mean=rng.uniform(2, 30), spread=rng.choice((0.0, 0.5, 1.5)), longest=200),
        environment_s=rng.choice((0.0, rng.uniform(0, 2))),
        step_s=rng.uniform(0, 6),
        refit_s=rng.choice((0.0, rng.uniform(0, 2))),
        jitter=rng.choice((0.0, 0.5)),
        checkpoint_every=rng.randint(0, 3),
        max_rows=rng.choice((None, None, rng.randint(1, 20))),
        max_batches=rng.choice((1000, 1000, 4)),
        faults=Faults(
            request_error=chance(0.2),
            request_stuck=chance(0.05),
            request_slow=chance(0.1),
            environment_error=chance(0.1),
            environment_stuck=chance(0.05),
            engine_crash_every_s=rng.uniform(5, 50) if faulty and rng.random() < 0.3 else float("inf"),
            refit_error=chance(0.1),
            refused=chance(0.4),
        ),
    )


@frozen(kw_only=True)
class ScheduleReport:
    """The result of one schedule."""

    seed: int
    violations: list[str]
    """Empty if everything held."""
    num_lives: int
    """Starts of the run: 1 if it never died."""
    num_steps: int
    num_groups: int
    """Trained on."""
    seconds: float
    """Virtual."""


def run_schedule(seed: int, cluster: SimulatedCluster | None = None) -> ScheduleReport:
    """Run one schedule with its deaths and resumes, and look whether everything holds.

    It holds that no run waits in vain, every group is trained on once or accounted for, no token is older than the
    bound, no more groups are under way than can be trained on within it, and nothing fails but by a drawn fault.
    """
    cluster = cluster or draw_cluster(seed)
    rng = random.Random(f"lives of {seed}")
    observer = _Observer(cluster=cluster)
    hooks = RunHooks([observer], installed=False)
    lives, now, status = 0, 0.0, "died"
    with TemporaryDirectory(dir=_memory()) as folder, _quiet():
        store = SimulatedStore(Path(folder))
        while status == "died" and not observer.violations:
            lives += 1
            last = lives == _MAX_LIVES
            dies_at = now + rng.expovariate(1 / 40) if rng.random() < 0.4 and not last else float("inf")
            if lives > 1 and rng.random() < 0.3:
                cluster = _with_less_under_way(cluster, rng)
                observer.was_narrowed = True
            observer.cluster = cluster
            run = SimulatedRun.build(
                _without_refit_faults(cluster) if last else cluster,
                seed * _MAX_LIVES + lives,
                folder=Path(folder),
                store=store,
                hooks=hooks,
                begins_at=now,
                dies_at=dies_at,
            )
            observer.begins(run, store)
            status = _live(run, observer)
            now = run.clock.now()
        if status == "completed":
            observer.ends()
    return ScheduleReport(
        seed=seed,
        violations=observer.violations,
        num_lives=lives,
        num_steps=len(observer.steps),
        num_groups=sum(map(len, observer.steps)),
        seconds=now,
    )


def _live(run: SimulatedRun, observer: _Observer) -> str:
    try:
        return run.run()
    except SimulatedKill:
        return "died"
    except ConfigError as error:
        feed = run.loop.feed
        most = run.cluster.max_batches * run.cluster.num_prompts
        if not isinstance(feed, RolloutFeed) or len(feed.all_groups) < most or "refused" not in str(error):
            observer.violations.append(f"ConfigError: {error}")
    except DeadlineExceeded as error:
        if "simulated: " in str(error):
            return "died"
        observer.violations.append(f"waited in vain: {error}")
    except EnvironmentFailure as error:
        if "max_failed_fraction" not in str(error):
            observer.violations.append(f"EnvironmentFailure: {error}")
    except NemoRLError as error:
        observer.violations.append(f"{type(error).__name__}: {error}")
    except Exception as error:
        observer.violations.append(f"a bug: {type(error).__name__}: {error}")
    return "failed"


@define(kw_only=True)
class _Observer:
    """Watches a run from outside and relies on the engines, not on what the run reports."""

    critical = True

    cluster: SimulatedCluster
    violations: list[str] = field(factory=list)
    steps: list[list[int]] = field(factory=list)
    """Group ids of each step that counts: a step after the checkpoint of a run that died does not."""
    finished: list[list[int]] = field(factory=list)
    """The same with those that were refused."""
    was_narrowed: bool = False
    """A life began with a lower bound or fewer prompts a step than the one before: what is too many is given up."""
    run: SimulatedRun = field(init=False)

    def begins(self, run: SimulatedRun, store: SimulatedStore) -> None:
        """A new life begins, at the newest checkpoint."""
        self.run = run
        step = 0 if store.newest is None else store.newest.step
        del self.steps[step:], self.finished[step:]
        run.runner.on_submit = self.submitted
        feed = run.loop.feed
        assert isinstance(feed, RolloutFeed)
        wait_for = feed._wait_for

        def watched(num: int, version: int) -> list[RolloutGroup]:
            began, limit = run.clock.now(), feed._deadline_s()
            groups = wait_for(num, version)
            if run.clock.now() - began >= limit:
                self.violations.append(f"waited for all of {limit:g} s, and the groups were there")
            return groups

        feed._wait_for = watched  # type: ignore[method-assign]

    def submitted(self, num_under_way: int) -> None:
        """Groups that run are at most those that the bound lets be trained on."""
        most = (self.cluster.rollouts.staleness + 1) * self.cluster.num_prompts
        if num_under_way > most:
            self.violations.append(f"{num_under_way} groups run at once; {most} can be trained on within the bound")

    def on_rollouts(self, run: RunState, groups: list[RolloutGroup]) -> None:
        """The groups of a step, before it trains on them."""
        feed = self.run.loop.feed
        assert isinstance(feed, RolloutFeed)
        self.steps.append([group.group_id for group in groups])
        self.finished.append([group.group_id for group in feed.all_groups])
        for group in groups:
            self._check(group, run.weight_version)
        if len(groups) != self.cluster.num_prompts:
            self.violations.append(f"step {run.step + 1} has {len(groups)} groups, not {self.cluster.num_prompts}")

    def on_step_end(self, run: RunState, metrics: dict[str, float]) -> None:
        """What is only given up where it may be."""
        rollouts = self.cluster.rollouts
        waits = (rollouts.order == "data" or rollouts.too_old == "wait") and not self.was_narrowed
        given_up = metrics["async/dropped_groups"] + metrics["async/resampled_groups"]
        if waits and given_up:
            self.violations.append(f"{given_up:g} groups were given up, which {rollouts.too_old!r} must not do")

    def ends(self) -> None:
        """The run was completed: every prompt was trained on once, refused, dropped or is under way."""
        feed = self.run.loop.feed
        assert isinstance(feed, RolloutFeed)
        seen = [group_id for step in self.finished for group_id in step]
        if self.run.loop.run_state.step < self.cluster.num_steps:  # the data ended before they filled a step
            seen += [group.group_id for group in feed.all_groups]
        doubled = sorted({group_id for group_id in seen if seen.count(group_id) > 1})
        if doubled:
            self.violations.append(f"groups {doubled} were taken twice")
        left = set(range(self.run.data.delivered)) - set(seen)
        under_way = feed._pump.started(0)
        if self.run.loop.run_state.step == self.cluster.num_steps and under_way and not self.was_narrowed:
            self.violations.append(f"{len(under_way)} groups were sampled for steps that never come")
        lost = left - under_way.keys() - {item.index for item in feed._pump._returned}
        history = self.run.loop.run_state.history
        dropped = sum(metrics["async/dropped_groups"] for metrics in history) + feed._dropped
        if len(lost) != dropped:
            self.violations.append(f"groups {sorted(lost)} are lost, of which {dropped:g} were dropped")

    def _check(self, group: RolloutGroup, version: int) -> None:
        if [r.index for r in group.rollouts] != list(range(self.cluster.group_size)):
            self.violations.append(f"group {group.group_id} has rollouts {[r.index for r in group.rollouts]}")
        for rollout in group.rollouts:
            if rollout.task_id != str(group.group_id):
                self.violations.append(f"group {group.group_id} holds a rollout of task {rollout.task_id}")
            if rollout.error is not None and not any(known in rollout.error.message for known in _EXPECTED):
                self.violations.append(f"a rollout failed by itself: {rollout.error}")
        sampled = [t for r in group.valid for s in r.segments for t in s if t.sampled]
        oldest = min((turn.token_ids[1] for turn in sampled), default=version)
        if version - oldest > self.cluster.rollouts.staleness:
            self.violations.append(
                f"group {group.group_id} was sampled by {oldest} and trained on at {version}: the bound is "
                f"{self.cluster.rollouts.staleness}"
            )


def _with_less_under_way(cluster: SimulatedCluster, rng: random.Random) -> SimulatedCluster:
    """Reduce the work in flight, as a user may by editing the configuration before a run is resumed."""
    rollouts = evolve(cluster.rollouts, staleness=rng.randint(0, cluster.rollouts.staleness))
    return evolve(cluster, num_prompts=rng.randint(1, cluster.num_prompts), rollouts=rollouts)


def _without_refit_faults(cluster: SimulatedCluster) -> SimulatedCluster:
    return evolve(cluster, faults=evolve(cluster.faults, refit_error=0.0))


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings about faults that are meant to happen."""
    logger = logging.getLogger("nemo_rl_core")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _memory() -> str | None:
    """Return a folder in memory, or None if the system has none."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
