"""Contents of a run's checkpoint, and how a run resumes from it."""

from __future__ import annotations

import copy
import logging
import pickle
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_rl_core.config import to_dict
from nemo_rl_core.errors import CheckpointError, DeadlineExceeded
from nemo_rl_core.machine.threads import in_thread
from nemo_rl_core.protocols.algorithm import Algorithm, KeepsState
from nemo_rl_core.registry import report_changes
from nemo_rl_core.training.checkpoints.export import export_model
from nemo_rl_core.training.checkpoints.store import Checkpoint, CheckpointStore

if TYPE_CHECKING:
    from nemo_rl_core.data.feed import ExampleFeed
    from nemo_rl_core.records.run_state import RunState
    from nemo_rl_core.rollouts.feed import RolloutFeed
    from nemo_rl_core.rollouts.recorded import RecordedFeed
    from nemo_rl_core.training.model.invariants import Invariants
    from nemo_rl_core.training.setup.parts import RunParts

__all__ = ["RunSaver"]

logger = logging.getLogger(__name__)
_RESCUE_TIMEOUT_S = 600.0
"""Of saving after a failure, when those who write may hang."""


class RunSaver:
    """Saves a run between two steps, and resumes it.

    Args:
        parts: What the run is made of.
        state: Of the run.
        feed: Where its items come from.
        invariants: Their counters are saved too.
        store: Where checkpoints are; None is the folder `checkpoints` of the run.
    """

    def __init__(
        self,
        parts: RunParts,
        state: RunState,
        feed: ExampleFeed | RolloutFeed | RecordedFeed,
        invariants: Invariants,
        store: CheckpointStore | None = None,
    ) -> None:
        self.parts = parts
        self.run = state
        self.feed = feed
        self.invariants = invariants
        saving = self.config = parts.config.checkpointing
        self.store = store or CheckpointStore(
            state.run_dir / "checkpoints",
            keep_last=saving.keep_last,
            keep_best=saving.keep_best,
            metric=saving.metric,
            higher_is_better=saving.higher_is_better,
        )
        self.newest: Checkpoint | None = None
        """Written by this run, or the one it went on from."""
        self._boundary: Callable[[], dict[str, Any]] = dict
        self._models_are_of_boundary = True
        self._tried_step = -1

    def mark_boundary(self) -> None:
        """Remember the state between two steps: what a checkpoint holds, also one of an abandoned step."""
        feed = _mark(self.feed)
        rest = {
            "invariants": self.invariants.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "python_rng": random.getstate(),
            "algorithm": _state_of(self.parts.algorithm),
        }
        self._boundary = lambda: {"feed": feed(), **rest}
        self._models_are_of_boundary = True

    def leave_boundary(self) -> None:
        """Note that the models are about to change: until the next boundary nothing whole can be saved."""
        self._models_are_of_boundary = False

    def save(self) -> Checkpoint | None:
        """Write a checkpoint of the last completed step.

        None if there is none, it is saved already, or the step under way has begun to change the models.
        """
        run = self.run
        saved = self.newest is not None and self.newest.step == run.step
        if not self.config.enabled or run.step == 0 or saved or not self._models_are_of_boundary:
            return None
        self._tried_step = run.step

        def write(folder: Path) -> None:
            for name, model in self.parts.trained.items():
                model.save(folder / name)
            with (folder / "loop.pkl").open("wb") as file:
                pickle.dump({**self._boundary(), "history": run.history}, file)

        state = {
            "algorithm": run.algorithm,
            "weight_version": run.weight_version,
            "metrics": run.history[-1] if run.history else {},
            "manifest": run.manifest,
            "config": to_dict(self.parts.config),
        }
        self.newest = self.store.save(run.step, write, state)
        return self.newest

    def rescue(self) -> Checkpoint | None:
        """Save after a failure, within a deadline, unless saving this step was tried before.

        Raises:
            DeadlineExceeded: It was not done in time.
            Exception: As `CheckpointStore.save`.
        """
        if self._tried_step == self.run.step:
            return None
        return _within(_RESCUE_TIMEOUT_S, self.save)

    def how_to_go_on(self) -> str:
        """Tell the reader of an error that ended the run what is saved and what to do; empty if there is nothing."""
        step, newest = self.run.step, self.newest
        if not self.config.enabled or (step == 0 and newest is None):
            return ""
        why = "saving failed" if self._models_are_of_boundary else "the models were changing"
        if newest is None:
            return f"Nothing is saved of its {step} steps ({why}). Set checkpointing.every to save on the way."
        again = "" if self.config.resume != "never" else " with checkpointing.resume=auto"
        lost = "" if newest.step == step and self._models_are_of_boundary else f" (nothing later: {why})"
        return f"Step {newest.step} is saved in {newest.path}{lost}; the same command{again} goes on from there."

    def resume(self) -> Checkpoint | None:
        """Continue from the newest whole checkpoint; None if there is none, or none is wanted.

        Raises:
            CheckpointError: It is of another algorithm, or damaged.
        """
        if not self.config.enabled:
            return None
        checkpoint = self.store.load(self.config.resume)
        if checkpoint is None:
            return None
        run, state = self.run, checkpoint.state()
        if state["algorithm"] != run.algorithm:
            raise CheckpointError(
                f"{checkpoint.path} was written by the algorithm {state['algorithm']!r}, this run is "
                f"{run.algorithm!r}. Use another run_dir, or checkpointing.resume=never."
            )
        changes = report_changes(state.get("manifest", []), run.manifest, where=str(checkpoint.path))
        if changes is not None:
            logger.warning("%s", changes)
        for name, model in self.parts.trained.items():
            model.load(checkpoint.path / name)
        loop = _read_loop_state(checkpoint)
        self.feed.load_state_dict(loop["feed"], version=int(state["weight_version"]))
        self.invariants.load_state_dict(loop["invariants"])
        torch.set_rng_state(loop["torch_rng"])
        random.setstate(loop["python_rng"])
        algorithm = self.parts.algorithm
        if loop.get("algorithm") is not None and isinstance(algorithm, KeepsState):
            algorithm.load_state_dict(loop["algorithm"])
        run.history = loop["history"]
        run.step = checkpoint.step
        run.weight_version = int(state["weight_version"])
        self.newest = checkpoint
        return checkpoint

    def export(self) -> None:
        """Write the policy as a Hugging Face checkpoint, if the configuration says so."""
        if self.config.enabled and self.config.export_model:
            export_model(self.parts.policy, self.parts.tokenizer, self.run.run_dir / "model")


def _mark(feed: ExampleFeed | RolloutFeed | RecordedFeed) -> Callable[[], dict[str, Any]]:
    """Return what makes the feed's state, turned into plain data only when it is saved if the feed can do that."""
    if hasattr(feed, "mark"):
        mark: Callable[[], dict[str, Any]] = feed.mark()
        return mark
    state = feed.state_dict()
    return lambda: state


def _read_loop_state(checkpoint: Checkpoint) -> Mapping[str, Any]:
    path = checkpoint.path / "loop.pkl"
    try:
        with path.open("rb") as file:
            return dict(pickle.load(file))
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        raise CheckpointError(f"Cannot read {path}: {type(error).__name__}: {error}.") from error


def _state_of(algorithm: Algorithm) -> object:
    """Return a copy of what the algorithm keeps from step to step; None if it keeps nothing."""
    return copy.deepcopy(algorithm.state_dict()) if isinstance(algorithm, KeepsState) else None


def _within(timeout_s: float, save: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """Run `save` in a thread of its own; one that hangs is left behind."""
    found = in_thread(save, name="nemo-rl-rescue")
    try:
        return found.result(timeout_s)
    except TimeoutError as error:
        if found.done():
            raise
        raise DeadlineExceeded(f"Saving was not done within {timeout_s:g} s.") from error
