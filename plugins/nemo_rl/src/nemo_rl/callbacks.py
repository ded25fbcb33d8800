"""Callbacks that come with the default set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_rl_core.config import to_dict
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.records.run_state import RunState
from nemo_rl_core.training.callbacks import Callback

__all__ = ["CheckpointCallback", "WandbCallback"]


class CheckpointCallback(Callback):
    """Saves a checkpoint at a fixed interval of steps, in addition to those of `checkpointing.every`.

    Args:
        every: Steps between checkpoints.
    """

    critical = True

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise ConfigError(f"CheckpointCallback(every={every}): every must be at least 1 step.")
        self.every = every

    def on_step_end(self, run: RunState) -> None:
        """Request a checkpoint if the step is due for one."""
        if run.step % self.every == 0:
            run.checkpoint_requested = True


class WandbCallback(Callback):
    """Sends metrics to Weights & Biases (needs the package `wandb`).

    Args:
        project: Name of the project in Weights & Biases.
        **settings: Further arguments of `wandb.init`.
    """

    def __init__(self, project: str = "nemo-rl", **settings: object) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "WandbCallback needs the package wandb, which is not installed: pip install wandb"
            ) from None
        self._wandb = wandb
        self._settings = {"project": project, **settings}
        self._run: Any = None

    def on_run_start(self, run: RunState) -> None:
        """Start the run in Weights & Biases."""
        self._run = self._wandb.init(config=to_dict(run.config), **self._settings)

    def on_step_end(self, run: RunState, metrics: Mapping[str, float]) -> None:
        """Send the step's metrics."""
        self._run.log(dict(metrics), step=run.step)

    def on_run_end(self, status: str) -> None:
        """Finish the run in Weights & Biases."""
        if self._run is not None:
            self._run.finish(exit_code=0 if status == "completed" else 1)
