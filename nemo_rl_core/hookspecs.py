"""Every hook of the framework, on one page (pluggy, project name `nemo_rl`).

Two families. *Provision* hooks hand over components that package metadata does not list; they are asked
only when a name is unknown to the metadata index or a full listing is wanted. *Lifecycle* hooks are the
events of a run; a `Callback` passed to `fit(callbacks=[...])` is a plugin of that run. An installed
distribution provides hooks through the entry-point group `nemo_rl.hooks`.

A listener that raises is named in a warning and the run goes on, unless it declares `critical = True`.
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

# -- provision: each returns {name: "module:attr" or the object}, or None for nothing ------------------


@hookspec
def nemo_rl_algorithms() -> Mapping[str, Any] | None:
    """Algorithms known only at run time."""


@hookspec
def nemo_rl_losses() -> Mapping[str, Any] | None:
    """Losses known only at run time."""


@hookspec
def nemo_rl_advantages() -> Mapping[str, Any] | None:
    """Advantage estimators known only at run time."""


@hookspec
def nemo_rl_training_backends() -> Mapping[str, Any] | None:
    """Training backends known only at run time."""


@hookspec
def nemo_rl_generation_backends() -> Mapping[str, Any] | None:
    """Generation backends known only at run time."""


@hookspec
def nemo_rl_environments() -> Mapping[str, Any] | None:
    """Environments known only at run time, such as those of a folder or of another registry."""


@hookspec
def nemo_rl_rewards() -> Mapping[str, Any] | None:
    """Rewards known only at run time."""


@hookspec
def nemo_rl_datasets() -> Mapping[str, Any] | None:
    """Dataset sources known only at run time."""


@hookspec
def nemo_rl_launchers() -> Mapping[str, Any] | None:
    """Launchers known only at run time."""


@hookspec
def nemo_rl_weight_syncs() -> Mapping[str, Any] | None:
    """Weight syncs known only at run time."""


@hookspec
def nemo_rl_loggers() -> Mapping[str, Any] | None:
    """Loggers known only at run time."""


@hookspec
def nemo_rl_callbacks() -> Mapping[str, Any] | None:
    """Callbacks known only at run time."""


@hookspec
def nemo_rl_sandboxes() -> Mapping[str, Any] | None:
    """Sandboxes known only at run time."""


@hookspec
def nemo_rl_exporters() -> Mapping[str, Any] | None:
    """Exporters known only at run time."""


@hookspec
def nemo_rl_commands() -> Mapping[str, Any] | None:
    """Commands known only at run time."""


@hookspec
def nemo_rl_defaults() -> Mapping[str, str] | None:
    """Kind to the name used when a configuration names none, such as {"training_backends": "x"}.

    "weight_syncs.workers" is for engines in processes of their own, "weight_syncs.colocated" for such that share their
    devices with the trainer on one machine; in the driver's process it is the core's `in_process`.
    """


@hookspec
def nemo_rl_node_manifests() -> Mapping[str, Sequence[Mapping[str, Any]]] | None:
    """Node name to the plugins of that node, from a launcher that knows several machines.

    The rows are those that `nemo-rl plugins list --json` prints there. Asked by `nemo-rl plugins doctor`, which
    reports nodes that differ from the machine it runs on.
    """


# -- lifecycle: events of one run, in the order in which they come ---------------------------------------


@hookspec
def on_run_start(run: RunState) -> None:
    """Once, after set-up and before the first step; `run.step` is 0, or the step resumed from."""


@hookspec
def on_step_start(run: RunState) -> None:
    """At the start of each step, before its data is taken."""


@hookspec
def on_rollouts(run: RunState, groups: Sequence[RolloutGroup]) -> None:
    """Each step fed by rollouts, when its groups are complete and before the batch is built."""


@hookspec
def on_batch(run: RunState, batch: BatchedDataDict) -> None:
    """Each step, with the finished global batch (advantages included), before the optimizer step."""


@hookspec
def on_train_step(run: RunState, metrics: Mapping[str, float]) -> None:
    """After the optimizer steps of a step, with the training metrics (`train/...`)."""


@hookspec
def on_refit(run: RunState, version: int) -> None:
    """After the generation backend has loaded new weights and its fingerprint was compared."""


@hookspec
def on_validation(run: RunState, metrics: Mapping[str, float]) -> None:
    """After a validation, with its metrics (`validation/...`)."""


@hookspec
def on_checkpoint(run: RunState, path: Path) -> None:
    """After a checkpoint is published at `path`."""


@hookspec
def on_step_end(run: RunState, metrics: Mapping[str, float]) -> None:
    """At the end of each step with all of its metrics, timers (`timing/...`) included.

    Set `run.stop_requested = True` here to end the run after this step.
    """


@hookspec
def on_error(run: RunState, error: BaseException) -> None:
    """When the run fails, before it is shut down."""


@hookspec
def on_run_end(run: RunState, status: str) -> None:
    """Once at the end; `status` is "completed", "interrupted" or "failed"."""
