"""The real run loop on simulated parts."""

from __future__ import annotations

import math
import random
from pathlib import Path
from tempfile import TemporaryDirectory

from attrs import define, field, frozen

from nemo_rl_core.errors import InvariantViolation
from nemo_rl_core.planning.simulation.clock import VirtualClock, VirtualLoop
from nemo_rl_core.planning.simulation.engines import SimulatedGeneration
from nemo_rl_core.planning.simulation.parts import (
    SimulatedAlgorithm,
    SimulatedChat,
    SimulatedData,
    SimulatedPolicy,
    SimulatedRunner,
    SimulatedStore,
    SimulatedSync,
    environment_of,
)
from nemo_rl_core.planning.simulation.spec import SimulatedCluster
from nemo_rl_core.protocols.generation_backend import SamplingParams
from nemo_rl_core.records.run_state import RunState
from nemo_rl_core.registry import RunHooks
from nemo_rl_core.rollouts.engine import RolloutEngine
from nemo_rl_core.schema import CheckpointConfig, ComponentChoice, InvariantsConfig, RolloutConfig, RunConfig
from nemo_rl_core.training.reporting.progress import Progress
from nemo_rl_core.training.setup.parts import RunParts
from nemo_rl_core.training.steps.loop import RunLoop

__all__ = ["SimulatedConfig", "SimulatedRun", "SimulationResult", "simulate"]

_MAX_SEQUENCE = 1 << 30


@frozen(kw_only=True)
class SimulatedConfig(RunConfig):
    """Configuration of a simulated run; not meant for files."""

    num_prompts: int = 1
    size: int = 1
    max_batches: int = 1000

    @property
    def num_items_per_step(self) -> int:
        """Number of groups of one step."""
        return self.num_prompts

    @property
    def group_size(self) -> int:
        """Number of rollouts of one group."""
        return self.size

    @property
    def max_batches_per_step(self) -> int:
        """See `SimulatedCluster`."""
        return self.max_batches


class _Record:
    """A run record that writes nothing."""

    def start(self, *_: object) -> None:
        """Write nothing."""

    def log(self, *_: object, **__: object) -> None:
        """Write nothing."""

    def finish(self, *_: object) -> None:
        """Write nothing."""


@define(kw_only=True)
class SimulatedRun:
    """One life of a run: from its start, or from a checkpoint, to its end or its death.

    Attributes:
        loop: The real run loop.
        generation, runner, data: What it drives.
    """

    cluster: SimulatedCluster
    clock: VirtualClock
    loop: RunLoop
    generation: SimulatedGeneration
    runner: SimulatedRunner
    data: SimulatedData

    @classmethod
    def build(
        cls,
        cluster: SimulatedCluster,
        seed: int,
        *,
        folder: Path,
        store: SimulatedStore | None = None,
        hooks: RunHooks | None = None,
        begins_at: float = 0.0,
        dies_at: float = math.inf,
    ) -> SimulatedRun:
        """Put a run together.

        Args:
            cluster: What is simulated.
            seed: Of everything that is drawn.
            folder: For checkpoints.
            store: Checkpoints of earlier lives.
            hooks: Listeners of the run.
            begins_at: Virtual time.
            dies_at: Virtual time at which the process is killed.
        """
        rng = random.Random(seed)
        clock = VirtualClock(VirtualLoop(begins_at), dies_at=dies_at)
        config = _config(cluster, seed)
        generation = SimulatedGeneration(cluster, clock.loop, rng)
        engine = RolloutEngine(
            generation=generation,  # type: ignore[arg-type]
            environment=environment_of(cluster, rng),
            chat=SimulatedChat(),  # type: ignore[arg-type]
            config=config.rollouts,
            sampling=SamplingParams(max_new_tokens=_MAX_SEQUENCE),
            pool=None,  # type: ignore[arg-type]
            seed=seed,
            max_sequence_length=_MAX_SEQUENCE,
            clock=clock,
        )
        runner = SimulatedRunner(engine, clock)
        data = SimulatedData(cluster.max_rows)
        parts = RunParts(
            config=config,
            tokenizer=None,  # type: ignore[arg-type]
            data=data,  # type: ignore[arg-type]
            algorithm=SimulatedAlgorithm(cluster, rng),  # type: ignore[arg-type]
            models={"policy": SimulatedPolicy(cluster, clock, rng, generation)},  # type: ignore[dict-item]
            generation=generation,  # type: ignore[arg-type]
            weight_sync=SimulatedSync(cluster, clock, rng),
            runner=runner,  # type: ignore[arg-type]
            in_flight_updates=cluster.engine.in_flight_updates and cluster.rollouts.weight_updates != "between",
            clock=clock,
        )
        state = RunState(config=config, run_dir=folder, algorithm="simulated", max_steps=cluster.num_steps)
        loop = RunLoop(
            parts,
            state,
            hooks or RunHooks(installed=False),
            _Record(),  # type: ignore[arg-type]
            Progress(),
            store,  # type: ignore[arg-type]
        )
        return cls(cluster=cluster, clock=clock, loop=loop, generation=generation, runner=runner, data=data)

    def run(self) -> str:
        """Run to the end and return the status of the result."""
        try:
            return self.loop.run().status
        finally:
            self.clock.loop.drop()


@frozen(kw_only=True)
class SimulationResult:
    """Times and rates of a simulated run."""

    seconds: float
    """Of all steps, in virtual time."""
    step_s: float
    """Of one step, in the steady state."""
    num_tokens: float
    """New tokens."""
    tokens_per_s: float
    """New tokens, in the steady state."""
    trainer_idle: float
    """Share of that time in which the trainer waited for rollouts."""
    engine_busy: float
    """Share of it that the engines' tokens would take at their full speed."""
    age_mean: float
    age_max: float
    """Steps by which the weights that sampled were behind."""
    trained_tokens: float
    """Prompt and response tokens that a step trained on, mean."""
    failed: float
    """Share of the rollouts that failed or passed a deadline."""
    history: list[dict[str, float]] = field(repr=False)
    """Metrics of each step."""


def simulate(cluster: SimulatedCluster, seed: int = 0) -> SimulationResult:
    """Run a simulation to its end and sum it up.

    The first half of the steps is left to warm up, and the last ones are left out, in which nothing is sampled any
    more for later ones.
    """
    with TemporaryDirectory() as folder:
        watch = _Watch()
        run = SimulatedRun.build(cluster, seed, folder=Path(folder), hooks=RunHooks([watch], installed=False))
        watch.run = run
        status = run.run()
    if status == "interrupted":
        raise KeyboardInterrupt
    if status != "completed":
        raise InvariantViolation(f"The simulated run ended as {status!r}.")
    history = run.loop.run_state.history
    first = len(history) // 2
    last = max(len(history) - cluster.rollouts.staleness, first + 1)
    (from_s, from_tokens), (to_s, to_tokens) = watch.at[first], watch.at[last]
    steps = history[first:last]
    seconds = max(to_s - from_s, 1e-12)
    full = cluster.engine.num_engines * cluster.engine.tokens_per_s
    return SimulationResult(
        seconds=watch.at[-1][0],
        step_s=seconds / len(steps),
        num_tokens=watch.at[-1][1],
        tokens_per_s=(to_tokens - from_tokens) / seconds,
        trainer_idle=sum(m["async/trainer_idle_s"] for m in steps) / seconds,
        engine_busy=(to_tokens - from_tokens) / (full * seconds),
        age_mean=sum(m["async/age_mean"] for m in steps) / len(steps),
        age_max=max(m["async/age_max"] for m in steps),
        trained_tokens=sum(m["performance/tokens_per_s"] * m["timing/step"] for m in steps) / len(steps),
        failed=sum(m["rollouts/failed_fraction"] for m in steps) / len(steps),
        history=history,
    )


class _Watch:
    """Time and tokens at the start and after each step."""

    def __init__(self) -> None:
        self.run: SimulatedRun
        self.at: list[tuple[float, float]] = []

    def on_run_start(self, run: RunState) -> None:
        self._look()

    def on_step_end(self, run: RunState, metrics: dict[str, float]) -> None:
        self._look()

    def _look(self) -> None:
        self.at.append((self.run.clock.now(), self.run.generation.num_tokens()))


def _config(cluster: SimulatedCluster, seed: int) -> SimulatedConfig:
    rollouts: RolloutConfig = cluster.rollouts
    return SimulatedConfig(
        algorithm="simulated",
        seed=seed,
        num_prompts=cluster.num_prompts,
        size=cluster.group_size,
        max_batches=cluster.max_batches,
        max_steps=cluster.num_steps,
        rollouts=_without_record(rollouts),
        checkpointing=CheckpointConfig(every=cluster.checkpoint_every, export_model=False),
        invariants=InvariantsConfig(enabled=False),
        weight_sync=ComponentChoice(),
    )


def _without_record(rollouts: RolloutConfig) -> RolloutConfig:
    from attrs import evolve

    return evolve(rollouts, record=False)
