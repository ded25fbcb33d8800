"""The simulated parts of a run, each behind the interface of the real one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from attrs import frozen

from nemo_rl_core.data.message_log import Extension
from nemo_rl_core.data.order import TaskItem
from nemo_rl_core.errors import DeadlineExceeded, EnvironmentFailure
from nemo_rl_core.planning.simulation.clock import VirtualClock
from nemo_rl_core.planning.simulation.engines import SimulatedGeneration
from nemo_rl_core.planning.simulation.spec import SimulatedCluster
from nemo_rl_core.protocols.algorithm import Update
from nemo_rl_core.protocols.environment import EnvironmentStep
from nemo_rl_core.protocols.generation_backend import SamplingParams
from nemo_rl_core.protocols.weight_sync import SyncReport
from nemo_rl_core.records.message import Message, Task
from nemo_rl_core.records.rollout import RolloutGroup
from nemo_rl_core.rollouts.engine import RolloutEngine

__all__ = [
    "SimulatedAlgorithm",
    "SimulatedChat",
    "SimulatedData",
    "SimulatedPolicy",
    "SimulatedRunner",
    "SimulatedStore",
    "SimulatedSync",
    "environment_of",
]

_T = TypeVar("_T")


class SimulatedData:
    """Prompts without end (or `max_rows` of them), numbered."""

    def __init__(self, max_rows: int | None) -> None:
        self.max_rows = max_rows
        self.delivered = 0

    def next(self, num: int) -> list[TaskItem] | None:
        """The next `num` prompts; None when fewer are left."""
        if self.max_rows is not None and self.delivered + num > self.max_rows:
            return None
        first, self.delivered = self.delivered, self.delivered + num
        ids = range(first, first + num)
        return [TaskItem(index=i, epoch=0, row_index=i, task_id=str(i), task={}) for i in ids]

    def state_dict(self) -> dict[str, Any]:
        """Return how many prompts were given out."""
        return {"delivered": self.delivered}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.delivered = state["delivered"]


class SimulatedChat:
    """A chat whose messages have no text and a single token each."""

    def initial(self, messages: Sequence[Message]) -> list[int]:
        """Return one token for the prompt."""
        return [0]

    def extend(self, messages: Sequence[Message], token_ids: Sequence[int], new: Sequence[Message]) -> Extension:
        """Return one more token."""
        return Extension([0], False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return no text."""
        return ""


def environment_of(cluster: SimulatedCluster, rng: random.Random) -> Callable[[Any], _Environment]:
    """Return a factory of environments that are late, fail and hang as often as the cluster says."""
    return lambda context: _Environment(cluster, rng)


class _Environment:
    config_class: ClassVar[type] = dict

    def __init__(self, cluster: SimulatedCluster, rng: random.Random) -> None:
        self.cluster = cluster
        self.rng = rng
        self.left = _turns(cluster, rng)

    def reset(self, task: Task, seed: int) -> Sequence[Message]:
        return [{"role": "user", "content": ""}]

    async def step(self, message: Message) -> EnvironmentStep:
        cluster, faults = self.cluster, self.cluster.faults
        if cluster.environment_s:
            await asyncio.sleep(_jittered(cluster.environment_s, cluster.jitter, self.rng))
        kind = self.rng.random()
        if kind < faults.environment_error:
            raise EnvironmentFailure("simulated: the environment failed")
        if kind < faults.environment_error + faults.environment_stuck:
            await asyncio.get_running_loop().create_future()
        self.left -= 1
        answer: list[Message] = [{"role": "user", "content": ""}] if self.left else []
        return EnvironmentStep(messages=answer, rewards={"reward": self.rng.random()}, terminated=self.left == 0)

    def close(self) -> None:
        """Release nothing."""


class SimulatedRunner:
    """The rollout engine on the virtual loop, in the trainer's own thread."""

    def __init__(self, engine: RolloutEngine, clock: VirtualClock) -> None:
        self.engine = engine
        self.clock = clock
        self.submitted: list[Future[RolloutGroup]] = []
        """Futures of the groups that were started and have not ended."""
        self.on_submit: Callable[[int], None] = lambda num_under_way: None

    def submit(
        self,
        group_id: int,
        task_id: str,
        task: Task,
        *,
        group_size: int,
        weight_version: int,
        sampling: SamplingParams | None = None,
        on_start: Callable[[int], None] | None = None,
    ) -> Future[RolloutGroup]:
        """Start one group, as `RolloutRunner.submit` does."""
        future = self.run(
            self.engine.run_group(
                group_id,
                task_id,
                task,
                group_size=group_size,
                weight_version=weight_version,
                sampling=sampling,
                on_start=on_start,
            )
        )
        self.submitted = [f for f in self.submitted if not f.done()] + [future]
        self.on_submit(len(self.submitted))
        return future

    def run(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run a coroutine on the virtual loop, as `RolloutRunner.run` does on its own."""
        return asyncio.run_coroutine_threadsafe(work, self.clock.loop)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Hold nothing: batches are formed alike in every simulation."""
        yield


class _Tokens:
    """Stand-in for a batch's loss mask, of which the run loop asks the sum."""

    def __init__(self, num: int) -> None:
        self.num = num

    def sum(self) -> int:
        return self.num


class _Batch:
    """The part of a batch that the run loop reads."""

    def __init__(self, groups: Sequence[RolloutGroup], prompt_tokens: int) -> None:
        rollouts = [r for g in groups for r in g.valid]
        self.num_trained = sum(t.token_ids[0] for r in rollouts for s in r.segments for t in s if t.sampled)
        self.num_tokens = self.num_trained + prompt_tokens * len(rollouts)
        self._len = len(rollouts)

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, name: str) -> _Tokens:
        return _Tokens(self.num_trained)


class SimulatedAlgorithm:
    """Trains on whatever comes, in one optimizer step."""

    feed = "rollouts"
    learns_from_rewards = False
    takes_stale_rollouts = True
    loss: Any = None

    def __init__(self, cluster: SimulatedCluster, rng: random.Random) -> None:
        self.cluster = cluster
        self.rng = rng
        self.models: Mapping[str, Any] = {}

    def keep_group(self, group: RolloutGroup) -> bool:
        """Refuse as many groups as the cluster says."""
        return self.rng.random() >= self.cluster.faults.refused

    def build_batch(self, items: Sequence[RolloutGroup]) -> _Batch:
        """Count the tokens."""
        return _Batch(items, self.cluster.prompt_tokens)

    def fill_batch(self, batch: _Batch, models: Mapping[str, Any]) -> None:
        """Add nothing."""

    def finish_batch(self, batch: _Batch) -> Mapping[str, float]:
        """Add nothing and report no metrics."""
        return {}

    def updates(self, batch: _Batch) -> Sequence[Update]:
        """Take one optimizer step on the whole batch."""
        return [Update(range(len(batch)), self.loss)]


class SimulatedPolicy:
    """Takes the time of a training step."""

    group = None

    def __init__(
        self, cluster: SimulatedCluster, clock: VirtualClock, rng: random.Random, engines: SimulatedGeneration
    ) -> None:
        self.cluster = cluster
        self.clock = clock
        self.rng = rng
        self.engines = engines

    def train_step(self, batch: _Batch, loss: object) -> dict[str, float]:
        """Let the time of a step pass."""
        cluster = self.cluster
        seconds = cluster.step_s + batch.num_tokens / cluster.train_tokens_per_s
        with self.engines.giving_way():
            self.clock.sleep(_jittered(seconds, cluster.jitter, self.rng))
        return {}

    def save(self, path: Path) -> None:
        """Save nothing: there are no weights."""

    def load(self, path: Path) -> None:
        """Load nothing: there are no weights."""


class SimulatedSync:
    """Takes the time of a weight update."""

    config_class: ClassVar[type] = dict

    def __init__(self, cluster: SimulatedCluster, clock: VirtualClock, rng: random.Random) -> None:
        self.cluster = cluster
        self.clock = clock
        self.rng = rng

    def sync(self, trainer: object, engine: object, *, version: int, share: bool, timeout_s: float) -> SyncReport:
        """Let the time of an update pass, then set the engines' weight version."""
        assert isinstance(engine, SimulatedGeneration)
        began = self.clock.now()
        with engine.giving_way():
            self.clock.sleep(_jittered(self.cluster.refit_s, self.cluster.jitter, self.rng))
        if self.rng.random() < self.cluster.faults.refit_error:
            raise DeadlineExceeded("simulated: the weight update passed its deadline")
        engine.update_weights(version, ())
        seconds = self.clock.now() - began
        return SyncReport(version=version, num_tensors=0, num_bytes=0, seconds=seconds, fingerprint=str(version))


@frozen
class _Saved:
    """A checkpoint of a `SimulatedStore`."""

    step: int
    path: Path
    kept: Mapping[str, Any]

    def state(self) -> dict[str, Any]:
        """Return the saved state, as `Checkpoint.state` does."""
        return dict(self.kept)


class SimulatedStore:
    """The newest checkpoint, without the care that a disk needs; it survives a simulated kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.newest: _Saved | None = None

    def save(self, step: int, write: Callable[[Path], None], state: Mapping[str, Any]) -> _Saved:
        """Write a checkpoint and keep it as the newest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write(self.folder)
        self.newest = _Saved(step, self.folder, state)
        return self.newest

    def load(self, resume: str) -> _Saved | None:
        """Return the newest checkpoint, or None."""
        return self.newest

    def list(self) -> list[_Saved]:
        """Return the newest checkpoint, if there is one."""
        return [] if self.newest is None else [self.newest]


def _turns(cluster: SimulatedCluster, rng: random.Random) -> int:
    if cluster.mean_turns is None:
        return rng.randint(1, cluster.num_turns)
    whole = int(cluster.mean_turns)
    return whole + (rng.random() < cluster.mean_turns - whole)


def _jittered(seconds: float, jitter: float, rng: random.Random) -> float:
    return seconds * rng.uniform(1 - jitter, 1 + jitter) if jitter else seconds
