"""Every hook of the framework, on one page (pluggy, project name `nemo_rl`).

There are two families. *Provision* hooks return components that package metadata does not list. They are called
only if a name is unknown to the metadata index, or for a full listing. *Lifecycle* hooks are the
events of a run; a `Callback` passed to `fit(callbacks=[...])` is a plugin of that run. An installed
distribution provides hooks through the entry-point group `nemo_rl.hooks`.

If a listener raises, a warning names it and the run goes on, unless the listener declares `critical = True`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_core.records.rollout import RolloutGroup
    from nemo_rl_core.records.run_state import RunState

__all__ = ["hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("nemo_rl")
hookimpl = pluggy.HookimplMarker("nemo_rl")

# -- provision: each returns {name: "module:attr" or the object}, or None if it has none ------------------


@hookspec
def nemo_rl_algorithms() -> Mapping[str, Any] | None:
    """Provide algorithms that are known only at run time."""


@hookspec
def nemo_rl_losses() -> Mapping[str, Any] | None:
    """Provide losses that are known only at run time."""


@hookspec
def nemo_rl_advantages() -> Mapping[str, Any] | None:
    """Provide advantage estimators that are known only at run time."""


@hookspec
def nemo_rl_training_backends() -> Mapping[str, Any] | None:
    """Provide training backends that are known only at run time."""


@hookspec
def nemo_rl_generation_backends() -> Mapping[str, Any] | None:
    """Provide generation backends that are known only at run time."""


@hookspec
def nemo_rl_environments() -> Mapping[str, Any] | None:
    """Provide environments that are known only at run time, such as those of a folder or of another registry."""


@hookspec
def nemo_rl_rewards() -> Mapping[str, Any] | None:
    """Provide rewards that are known only at run time."""


@hookspec
def nemo_rl_datasets() -> Mapping[str, Any] | None:
    """Provide dataset sources that are known only at run time."""


@hookspec
def nemo_rl_launchers() -> Mapping[str, Any] | None:
    """Provide launchers that are known only at run time."""


@hookspec
def nemo_rl_weight_syncs() -> Mapping[str, Any] | None:
    """Provide weight syncs that are known only at run time."""


@hookspec
def nemo_rl_loggers() -> Mapping[str, Any] | None:
    """Provide loggers that are known only at run time."""


@hookspec
def nemo_rl_callbacks() -> Mapping[str, Any] | None:
    """Provide callbacks that are known only at run time."""


@hookspec
def nemo_rl_sandboxes() -> Mapping[str, Any] | None:
    """Provide sandboxes that are known only at run time."""


@hookspec
def nemo_rl_exporters() -> Mapping[str, Any] | None:
    """Provide exporters that are known only at run time."""


@hookspec
def nemo_rl_commands() -> Mapping[str, Any] | None:
    """Provide commands that are known only at run time."""


@hookspec
def nemo_rl_defaults() -> Mapping[str, str] | None:
    """Provide default components: the name for each kind, used if a configuration names none.

    The key is the kind, such as "training_backends". "weight_syncs.workers" is for engines in separate processes,
    "weight_syncs.colocated" for those that share their devices with the trainer on one machine. For an engine in the
    driver's process the default is always the core's `in_process`.
    """


@hookspec
def nemo_rl_node_manifests() -> Mapping[str, Sequence[Mapping[str, Any]]] | None:
    """Provide the installed plugins of each node by its name; for launchers of several machines.

    The rows are those that `nemo-rl plugins list --json` prints on the node. Called by `nemo-rl plugins doctor`, which
    reports nodes that differ from its own machine.
    """


# -- lifecycle: events of one run, in the order in which they come ---------------------------------------


@hookspec
def on_run_start(run: RunState) -> None:
    """Called once, after set-up and before the first step; `run.step` is 0, or the step that the run resumes from."""


@hookspec
def on_step_start(run: RunState) -> None:
    """Called at the start of each step, before its data is taken."""


@hookspec
def on_rollouts(run: RunState, groups: Sequence[RolloutGroup]) -> None:
    """Called in each step that trains on rollouts, after its groups are complete and before the batch is built."""


@hookspec
def on_batch(run: RunState, batch: BatchedDataDict) -> None:
    """Called in each step with the finished global batch, advantages included, before the optimizer step."""


@hookspec
def on_train_step(run: RunState, metrics: Mapping[str, float]) -> None:
    """Called after the optimizer steps of a step, with the training metrics (`train/...`)."""


@hookspec
def on_refit(run: RunState, version: int) -> None:
    """Called after the generation backend has loaded new weights and the fingerprints have been compared."""


@hookspec
def on_validation(run: RunState, metrics: Mapping[str, float]) -> None:
    """Called after a validation, with its metrics (`validation/...`)."""


@hookspec
def on_checkpoint(run: RunState, path: Path) -> None:
    """Called after a checkpoint is published at `path`."""


@hookspec
def on_step_end(run: RunState, metrics: Mapping[str, float]) -> None:
    """Called at the end of each step with all its metrics, including timers (`timing/...`).

    Set `run.stop_requested = True` here to end the run after this step.
    """


@hookspec
def on_error(run: RunState, error: BaseException) -> None:
    """Called if the run fails, before it is shut down."""


@hookspec
def on_run_end(run: RunState, status: str) -> None:
    """Called once at the end; `status` is "completed", "interrupted" or "failed"."""
