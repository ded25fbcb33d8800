"""Runs episodes: many at a time, each failing on its own, every wait with a deadline and a name."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from nemo_rl_core.data.message_log import ChatFormatter
from nemo_rl_core.machine.clock import Clock
from nemo_rl_core.machine.task_deadlines import DeadlineWatch
from nemo_rl_core.protocols.generation_backend import GenerationBackend, SamplingParams
from nemo_rl_core.records.message import Task
from nemo_rl_core.records.rollout import Rollout, RolloutGroup
from nemo_rl_core.records.seeds import stable_seed
from nemo_rl_core.rollouts.context import EnvironmentFactory, EpisodeContext
from nemo_rl_core.rollouts.episode import Episode, EpisodeSettings
from nemo_rl_core.rollouts.scoring.process_pool import ProcessPool
from nemo_rl_core.rollouts.traffic import GenerationTraffic
from nemo_rl_core.schema import RolloutConfig

__all__ = ["EnvironmentFactory", "RolloutEngine"]

_log = logging.getLogger(__name__)


class RolloutEngine:
    """Samples groups of rollouts.

    Groups are admitted in the order in which they are asked for, whole groups one after another, and no
    more than `config.max_in_flight` episodes run at a time. What a rollout samples depends on its seeds
    only: (run seed, group id, task id, index in the group, turn); the environment of every rollout of a
    group is reset with one seed, so that the group shares one prompt.

    Args:
        generation: Samples completions.
        environment: Makes the environment of an episode.
        chat: Turns messages into tokens.
        config: Limits and deadlines.
        sampling: How completions are drawn unless a call says otherwise; its `seed` is replaced.
        pool: Runs what environments and rewards hand to `run_in_pool`.
        seed: Of the run.
        max_sequence_length: Tokens of prompt and completions together.
        clock: Of idle times; None is the machine's.
    """

    def __init__(
        self,
        *,
        generation: GenerationBackend,
        environment: EnvironmentFactory,
        chat: ChatFormatter,
        config: RolloutConfig,
        sampling: SamplingParams,
        pool: ProcessPool,
        seed: int,
        max_sequence_length: int,
        clock: Clock | None = None,
    ) -> None:
        self.generation = generation
        self.config = config
        self.traffic = GenerationTraffic(clock)
        """Episodes that wait for the generation backend."""
        self.settings = EpisodeSettings(
            environment=environment,
            generation=generation,
            chat=chat,
            config=config,
            max_sequence_length=max_sequence_length,
            traffic=self.traffic,
        )
        self.sampling = sampling
        self.pool = pool
        self.seed = seed
        self.weight_version = 0
        """Version of the weights in the generator, set after each update."""
        self.num_in_flight = 0
        """Episodes running now."""
        self._num_unadmitted = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._slots = asyncio.Semaphore(config.max_in_flight)
        self._admission = asyncio.Lock()
        self._watch = DeadlineWatch(min(config.generation_timeout_s, config.environment_timeout_s))

    async def run_group(
        self,
        group_id: int,
        task_id: str,
        task: Task,
        *,
        group_size: int,
        weight_version: int,
        sampling: SamplingParams | None = None,
        on_start: Callable[[int], None] | None = None,
    ) -> RolloutGroup:
        """Sample `group_size` rollouts of one task.

        Args:
            group_id: Position of the task in the run's data order.
            task_id: Name of the task.
            task: The row.
            group_size: Rollouts to sample.
            weight_version: Version of the weights now in the generator.
            sampling: Instead of the engine's own, as for validation.
            on_start: Called when the first of its episodes finds a place, with the version of the weights that are in
                the generator by then; it is recorded with the group.

        Returns:
            The group, its rollouts in index order; one that failed carries `error` and the others go on.
        """
        self._bind_loop()
        params = sampling or self.sampling
        asked = asyncio.get_running_loop().time()
        tasks: list[asyncio.Task[Rollout]] = []
        started = weight_version

        def start() -> None:
            nonlocal started
            started = max(weight_version, self.weight_version)
            if on_start is not None:
                on_start(started)

        try:
            await self._admit(group_id, task_id, task, group_size, params, asked, tasks, start)
            rollouts = await asyncio.gather(*tasks)
        except BaseException:
            await _cancel(tasks)
            raise
        return RolloutGroup(group_id=group_id, task_id=task_id, rollouts=list(rollouts), weight_version=started)

    async def settled(self, timeout_s: float) -> None:
        """Wait until all episodes that may run wait for the generation backend, `timeout_s` at most.

        That is: every group that was asked for is admitted, or no place is left.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not self._is_settled():
                    await asyncio.sleep(0.0005)
        except TimeoutError:
            _log.debug("not all episodes asked for tokens within %g s", timeout_s)

    def _is_settled(self) -> bool:
        admitted = self._num_unadmitted == 0 or self._slots.locked()
        return admitted and self.num_in_flight <= self.traffic.count  # an episode may ask for more than one

    async def _admit(
        self,
        group_id: int,
        task_id: str,
        task: Task,
        group_size: int,
        sampling: SamplingParams,
        asked: float,
        tasks: list[asyncio.Task[Rollout]],
        start: Callable[[], None],
    ) -> None:
        """Start the episodes of a group as places become free, into `tasks`; `start` is called before the first."""
        environment_seed = stable_seed(self.seed, group_id, task_id, "environment", bits=31)
        self._num_unadmitted += 1
        try:
            async with self._admission:
                for index in range(group_size):
                    await self._slots.acquire()
                    self.num_in_flight += 1
                    if index == 0:
                        start()
                    episode = self._episode(group_id, task_id, task, index, environment_seed, sampling, asked)
                    running = asyncio.create_task(episode.run(self._watch))
                    running.add_done_callback(self._release)
                    tasks.append(running)
        finally:
            self._num_unadmitted -= 1

    def _bind_loop(self) -> None:
        """Waiting primitives belong to one event loop; start afresh on another."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._slots = asyncio.Semaphore(self.config.max_in_flight)
            self._admission = asyncio.Lock()
            self._watch = DeadlineWatch(min(self.config.generation_timeout_s, self.config.environment_timeout_s))
            self.num_in_flight = self._num_unadmitted = 0
            self.traffic.reset()

    def _episode(
        self,
        group_id: int,
        task_id: str,
        task: Task,
        index: int,
        environment_seed: int,
        sampling: SamplingParams,
        asked: float,
    ) -> Episode:
        rollout = Rollout(
            rollout_id=f"{task_id}/{index}",
            task_id=task_id,
            index=index,
            seed=stable_seed(self.seed, group_id, task_id, index),
            task=task,
        )
        return Episode(
            self.settings,
            rollout,
            group_id=group_id,
            environment_seed=environment_seed,
            context=EpisodeContext(self.pool, reward_timeout_s=self.config.reward_timeout_s),
            sampling=sampling,
            asked=asked,
        )

    def _release(self, _: asyncio.Task[Rollout]) -> None:
        """An episode has ended, be it cancelled before its first step."""
        self.num_in_flight -= 1
        self._slots.release()


async def _cancel(tasks: Sequence[asyncio.Task[Rollout]]) -> None:
    """Cancel the tasks and wait until their environments are closed."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            _log.warning("a rollout failed while it was cancelled: %s", result)
