"""One run, from its configuration to its result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl_core.records.run_state import RunResult, RunState
from nemo_rl_core.schema import RunConfig
from nemo_rl_core.training.reporting.tracing import traced

if TYPE_CHECKING:
    from nemo_rl_core.protocols.logger import Logger
    from nemo_rl_core.registry import ComponentRef
    from nemo_rl_core.training.setup.parts import RunInputs

__all__ = ["default_run_dir", "run"]


def default_run_dir(config: RunConfig) -> Path:
    """Return the run folder: `run_dir`, or `runs/<name>`. It is absolute and does not move with the working folder."""
    return Path(config.run_dir or f"runs/{config.name or config.algorithm}").expanduser().absolute()


def run(config: RunConfig, inputs: RunInputs, callbacks: Sequence[Any] = (), *, debug: bool | None = None) -> RunResult:
    """Assemble and run a finalized configuration.

    Args:
        config: Configuration of the run.
        inputs: Python objects that replace configured ones.
        callbacks: Listeners of this run.
        debug: Trace which plugin's code runs when; None follows NEMO_RL_DEBUG.
    """
    from nemo_rl_core.registry import contained, get_registry

    run_dir = default_run_dir(config)
    algorithm = get_registry().resolve("algorithms", config.algorithm, plugins=config.plugins)
    # The last net: what a plugin raises where no call is guarded, such as in a property.
    with traced(run_dir, debug), contained("algorithms", algorithm, "call"):
        return _run(config, inputs, callbacks, run_dir)


def _run(config: RunConfig, inputs: RunInputs, callbacks: Sequence[Any], run_dir: Path) -> RunResult:
    from nemo_rl_core.registry import RunHooks
    from nemo_rl_core.rollouts.recorded import replay_config
    from nemo_rl_core.training.checkpoints.run_folder import check_run_folder
    from nemo_rl_core.training.reporting.progress import make_progress
    from nemo_rl_core.training.reporting.record import RunRecord
    from nemo_rl_core.training.setup.assemble import assemble
    from nemo_rl_core.training.steps.loop import RunLoop

    if inputs.recorded is not None:
        config = replay_config(config)
    hooks = RunHooks(callbacks)
    parts = assemble(config, inputs, run_dir=str(run_dir))
    try:
        data_steps = None if parts.recorded is not None else parts.data.total_steps(config.num_items_per_step)
        max_steps = _last_step(config.max_steps, data_steps)
        state = RunState(config=config, run_dir=run_dir, algorithm=str(config.algorithm), max_steps=max_steps)
        record = RunRecord(run_dir, _loggers(config, parts.components))
        if config.checkpointing.enabled:
            check_run_folder([model.group for model in parts.trained.values()], run_dir)
        loop = RunLoop(parts, state, hooks, record, make_progress(config.logging.progress))
        return loop.run()
    finally:
        parts.close()


def _last_step(max_steps: int | None, data_steps: int | None) -> int | None:
    """Whichever comes first; data too small for one step is left to the first step to tell."""
    bounds = [bound for bound in (max_steps, data_steps or None) if bound is not None]
    return min(bounds, default=None)


def _loggers(config: RunConfig, used: list[ComponentRef]) -> list[tuple[str, Logger]]:
    from nemo_rl_core.config.run_components import RunComponents

    components = RunComponents(config.plugins)
    made = []
    for choice in config.logging.loggers:
        ref = components.resolve("loggers", choice.name)
        made.append((ref.name, components.make(ref, choice.options)))
    used += components.used
    return made
