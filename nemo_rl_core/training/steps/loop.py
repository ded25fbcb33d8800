"""The one run loop: every algorithm, synchronous or not, fed by rollouts or by rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_rl_core.config import to_dict
from nemo_rl_core.data.feed import ExampleFeed
from nemo_rl_core.errors import ConfigError, RunInterrupted, extend_message
from nemo_rl_core.machine.interrupts import InterruptGuard
from nemo_rl_core.protocols.algorithm import ChoosesFeed
from nemo_rl_core.records.run_state import RunResult, RunState, Sample
from nemo_rl_core.registry import PluginCall, RunHooks, contained, get_registry
from nemo_rl_core.rollouts.feed import RolloutFeed
from nemo_rl_core.rollouts.metrics import rollout_metrics
from nemo_rl_core.rollouts.recorded import RecordedFeed
from nemo_rl_core.training.checkpoints.saver import RunSaver
from nemo_rl_core.training.model.invariants import Invariants
from nemo_rl_core.training.reporting.progress import Progress
from nemo_rl_core.training.reporting.record import RunRecord
from nemo_rl_core.training.setup.parts import RunParts, SamplingChanges, sampling_params
from nemo_rl_core.training.steps.refit import Refit
from nemo_rl_core.training.steps.timers import StageTimers
from nemo_rl_core.training.steps.validation import validate_loss, validate_rollouts

if TYPE_CHECKING:
    from nemo_rl_core.protocols.algorithm import Update
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_core.records.rollout import RolloutGroup
    from nemo_rl_core.training.checkpoints.store import Checkpoint, CheckpointStore

__all__ = ["RunLoop"]

logger = logging.getLogger(__name__)


class RunLoop:
    """Steps from the first (or the resumed) to the last.

    Args:
        parts: What the run is made of.
        state: The run's state, shared with the hooks.
        hooks: Lifecycle hooks of this run.
        record: The run folder.
        progress: What is shown.
        store: Where checkpoints are; None is in the run folder.
    """

    def __init__(
        self,
        parts: RunParts,
        state: RunState,
        hooks: RunHooks,
        record: RunRecord,
        progress: Progress,
        store: CheckpointStore | None = None,
    ) -> None:
        self.parts = parts
        self.config = parts.config
        self.run_state = state
        self.hooks = hooks
        self.record = record
        self.progress = progress
        self.timers = parts.turns.timed = StageTimers(parts.clock.now)
        self.invariants = Invariants(self.config.invariants)
        self.feed = _make_feed(parts, state.max_steps)
        self.refit = Refit(parts)
        self.saver = RunSaver(parts, state, self.feed, self.invariants, store)

    # -- the run --------------------------------------------------------------------------------

    def run(self) -> RunResult:
        """Run to the end, to a stop request, to an interrupt or a failure; the last whole step is saved.

        Raises:
            NemoRLError: Whatever ended the run early, after the hooks have heard of it.
        """
        run = self.run_state
        status = "failed"
        with InterruptGuard() as guard:
            try:
                status = self._work(guard)
            except BaseException as error:
                if isinstance(error, Exception):  # not a second Ctrl-C
                    self._rescue(error)
                self.hooks.call("on_error", run=run, error=error)
                raise
            finally:
                self.hooks.call("on_run_end", run=run, status=status)
                self.record.finish(status)
                self.progress.finish(run, status)
        return self._result(status)

    def _work(self, guard: InterruptGuard) -> str:
        run = self.run_state
        try:
            run.manifest = get_registry().manifest(self.parts.components, self.hooks.plugins)
            resumed = self.saver.resume()
            if resumed is not None:
                self.progress.note(f"Resumed from {resumed.path}")
            self.record.start(self.config.name or run.algorithm, to_dict(self.config), run.manifest)
            self.progress.start(run)
            self.hooks.call("on_run_start", run=run)
            self.saver.mark_boundary()
            return self._steps(guard)
        except RunInterrupted:
            self.progress.note("Stopping: saving the state of the last completed step.")
            self._save()
            return "interrupted"

    def _steps(self, guard: InterruptGuard) -> str:
        run, validation = self.run_state, self.config.validation
        if validation.at_start and run.step == 0:
            with guard.abandonable():
                first = self._validate()
            run.history.append({"step": 0.0, **first})
            self.record.log(first, step=0)
        if run.step and self._validates_now() and not _was_validated(run.history[-1:]):
            self._validate_last_step(guard)  # it failed after the step that the run went on from
        while not self._finished():
            guard.check()
            metrics = self._step(guard)
            if metrics is None:
                break
            self._after_step(metrics, guard)
        if validation.at_end and not self._validates_now():
            self._validate_last_step(guard)
        self._save()
        self.saver.export()
        return "completed"

    def _finished(self) -> bool:
        run = self.run_state
        return run.stop_requested or (run.max_steps is not None and run.step >= run.max_steps)

    def _step(self, guard: InterruptGuard) -> dict[str, float] | None:
        """One step: take items, build the batch, fill in logprobs, update, measure; None at the end of the data."""
        run, algorithm = self.run_state, self.parts.algorithm
        started = self.parts.clock.now()
        self.hooks.call("on_step_start", run=run)
        metrics: dict[str, float] = {}
        with guard.abandonable():
            items = self._take_items(metrics)
        if items is None:
            return None
        with self.timers("build_batch"), PluginCall("algorithms", algorithm, "build_batch"):
            batch = algorithm.build_batch(items)
        with self.timers("logprobs"), contained("algorithms", algorithm, "fill_batch"):
            algorithm.fill_batch(batch, self.parts.models)
        with self.timers("advantages"), PluginCall("algorithms", algorithm, "finish_batch"):
            metrics.update({f"train/{n}": v for n, v in algorithm.finish_batch(batch).items()})
        self.hooks.call("on_batch", run=run, batch=batch)
        training = self._update(batch)
        self.hooks.call("on_train_step", run=run, metrics=training)
        metrics.update(training)
        run.step += 1
        run.weight_version = run.step
        seconds = max(self.parts.clock.now() - started, 1e-9)
        metrics["timing/step"] = seconds
        if isinstance(self.feed, RolloutFeed):
            metrics.update(self.feed.metrics(run.step - 1))
        metrics["performance/tokens_per_s"] = batch.num_tokens / seconds
        metrics["performance/trained_tokens_per_s"] = float(batch["loss_mask"].sum()) / seconds
        return metrics

    def _take_items(self, metrics: dict[str, float]) -> Sequence[Any] | None:
        run = self.run_state
        if isinstance(self.feed, ExampleFeed):
            with self.timers("data"):
                return self.feed.next(run.weight_version)
        if isinstance(self.feed, RolloutFeed) and not self._samples():
            with self.timers("data"):
                return self.feed.rows()
        self._refit()
        with self.timers("rollouts"), self.refit.of_restarted():
            groups = self.feed.next(run.weight_version)
        if groups is None:
            return None
        metrics.update(rollout_metrics(self.feed.all_groups))
        metrics["rollouts/discarded_groups"] = float(self.feed.discarded)
        if self.parts.generation is not None:
            metrics.update({f"generation/{n}": v for n, v in self.parts.generation.metrics().items()})
        # A lone rollout has no variance and may carry a signal all the same.
        if self.config.group_size > 1 and getattr(self.parts.algorithm, "learns_from_rewards", True):
            self.invariants.check_signal(metrics.get("rollouts/zero_variance_fraction"))
        self._keep_samples(groups)
        if self.config.rollouts.record:
            with self.timers("record"):
                self.record.rollouts(self.feed.all_groups, step=run.step + 1)
        self.hooks.call("on_rollouts", run=run, groups=groups)
        return groups

    def _samples(self) -> bool:
        """Whether this step trains on rollouts; an algorithm may take the rows of the data in some."""
        algorithm = self.parts.algorithm
        with PluginCall("algorithms", algorithm, "samples"):
            return not isinstance(algorithm, ChoosesFeed) or bool(algorithm.samples(self.run_state.step))

    def _update(self, batch: BatchedDataDict) -> dict[str, float]:
        """Every optimizer step of the batch; a metric is the mean over the steps that report it."""
        values: dict[str, list[float]] = {}
        algorithm = self.parts.algorithm
        with PluginCall("algorithms", algorithm, "updates"):
            updates = list(algorithm.updates(batch))
        _check_trained(updates, self.parts)
        first_of_policy, trained = True, self.parts.trained
        self.saver.leave_boundary()
        with self.timers("train"):
            for update in updates:
                whole = len(update.indices) == len(batch) and list(update.indices) == list(range(len(batch)))
                part = batch if whole else batch.select(list(update.indices))
                metrics = trained[update.model].train_step(part, update.loss)
                is_policy = update.model == "policy"
                if is_policy and first_of_policy:
                    first_of_policy = False
                    if isinstance(self.feed, RolloutFeed) and self.config.rollouts.staleness == 0:
                        self.invariants.check_first_update(metrics)
                for name, value in metrics.items():
                    key = name if is_policy else f"{update.model}/{name}"
                    values.setdefault(key, []).append(value)
        means = {key: sum(reported) / len(reported) for key, reported in values.items()}
        stale = self.config.rollouts.staleness > 0
        self.invariants.check_mismatch(means, may_abort=self.parts.recorded is None, stale=stale)
        return {f"train/{name}": value for name, value in means.items()}

    def _after_step(self, metrics: dict[str, float], guard: InterruptGuard) -> None:
        run = self.run_state
        run.history.append({"step": float(run.step), **metrics})
        self.saver.mark_boundary()
        try:
            with guard.abandonable():
                if self._validates_now():
                    with self.timers("validation"):
                        metrics.update(self._validate())
                self._go_on_sampling()
        finally:  # the step is done, and will be saved, whatever fails after it or cuts it off
            metrics.update(self.timers.collect())
            run.history[-1].update(metrics)
            self.record.log(metrics, step=run.step)
            self.progress.step(run, metrics)
            self.hooks.call("on_step_end", run=run, metrics=metrics)
        every = self.config.checkpointing.every
        if run.checkpoint_requested or (every and run.step % every == 0):
            run.checkpoint_requested = False
            self._save()

    # -- refit and validation ---------------------------------------------------------------------

    def _refit(self) -> None:
        """Bring the engine to the policy's weights, unless it has them; then it is its turn."""
        run = self.run_state
        due = self.refit.is_due(run.weight_version)
        if due:
            with self.timers("refit"):
                self.refit.bring_to(run.weight_version)
        self.parts.turns.sampling()
        if due:
            self.hooks.call("on_refit", run=run, version=run.weight_version)

    def _go_on_sampling(self) -> None:
        """With a staleness bound above 0: new weights for the engine, and prompts for it, as soon as there are."""
        if isinstance(self.feed, RolloutFeed) and self.feed.staleness > 0 and not self._finished():
            self._refit()
            self.feed.start(self.run_state.weight_version)

    def _validates_now(self) -> bool:
        """Whether a validation belongs to the last step."""
        every = self.config.validation.every
        return bool(every) and self.run_state.step % every == 0

    def _validate_last_step(self, guard: InterruptGuard) -> None:
        run = self.run_state
        with guard.abandonable():
            found = self._validate()
        last = run.history[-1] if run.history else {}
        last.update(found)
        self.record.log({**last}, step=run.step)

    def _validate(self) -> dict[str, float]:
        run, parts, config = self.run_state, self.parts, self.config.validation
        if parts.runner is None:
            metrics = validate_loss(parts.policy, parts.models, parts.algorithm, parts.data, config)
        else:
            self._refit()
            changes: SamplingChanges = {"temperature": config.temperature}
            if config.max_new_tokens is not None:
                changes["max_new_tokens"] = config.max_new_tokens
            with self.refit.of_restarted():
                metrics, groups = validate_rollouts(
                    parts.runner,
                    parts.data,
                    config,
                    sampling=sampling_params(self.config, **changes),
                    weight_version=run.weight_version,
                    max_failed_fraction=self.config.rollouts.max_failed_fraction,
                    correct_reward=self.config.evaluation.correct_reward,
                )
            self._keep_samples(groups)
        self.hooks.call("on_validation", run=run, metrics=metrics)
        return metrics

    def _keep_samples(self, groups: Sequence[RolloutGroup], num: int = 8) -> None:
        rollouts = [group.valid[0] for group in groups if group.valid][:num]
        self.run_state.samples = [
            Sample(
                prompt=str(rollout.messages[0].get("content", "")) if rollout.messages else "",
                response=rollout.response,
                reward=rollout.reward,
                step=self.run_state.step,
            )
            for rollout in rollouts
        ]

    def _rescue(self, error: Exception) -> None:
        """Save the last whole step of a run that fails, and tell the reader of `error` where it is."""
        try:
            self._save(self.saver.rescue)
        except Exception as second:  # who writes may be what died; the first error is the one to raise
            logger.warning("Step %d could not be saved: %s", self.run_state.step, str(second).partition("\n")[0])
        extend_message(error, self.saver.how_to_go_on())

    def _save(self, save: Callable[[], Checkpoint | None] | None = None) -> None:
        with self.timers("checkpoint"):
            checkpoint = (save or self.saver.save)()
        if checkpoint is not None:
            self.progress.note(f"Saved {checkpoint.path}")
            self.hooks.call("on_checkpoint", run=self.run_state, path=checkpoint.path)

    def _result(self, status: str) -> RunResult:
        run = self.run_state
        model = run.run_dir / "model"
        checkpoints = self.saver.store.list()
        return RunResult(
            status=status,
            step=run.step,
            metrics=run.history[-1] if run.history else {},
            history=run.history,
            run_dir=run.run_dir,
            model_path=model if status == "completed" and model.is_dir() else None,
            checkpoint=checkpoints[-1].path if checkpoints else None,
            samples=run.samples,
        )


def _was_validated(history: Sequence[Mapping[str, float]]) -> bool:
    return any(name.startswith("validation/") for metrics in history for name in metrics)


def _check_trained(updates: Sequence[Update], parts: RunParts) -> None:
    """Every update is of a model that takes steps."""
    trained = parts.trained
    for name in dict.fromkeys(update.model for update in updates):
        if name in trained:
            continue
        what = "declares frozen (trained=False)" if name in parts.models else "does not name"
        raise ConfigError(
            f"{type(parts.algorithm).__name__}.updates trains the model {name!r}, which its `models` {what}. Trained "
            f"are: {', '.join(trained)}."
        )


def _make_feed(parts: RunParts, last_step: int | None) -> ExampleFeed | RolloutFeed | RecordedFeed:
    config = parts.config
    if parts.recorded is not None:
        return RecordedFeed(parts.recorded, parts.algorithm, config.num_items_per_step)
    if parts.runner is None:
        return ExampleFeed(parts.data, config.num_items_per_step)
    return RolloutFeed(
        data=parts.data,
        runner=parts.runner,
        algorithm=parts.algorithm,
        config=config,
        max_batches=config.max_batches_per_step,
        last_step=last_step,
        clock=parts.clock,
    )
