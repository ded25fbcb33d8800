"""The contract of a callback: a listener of one run."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import attrs

from nemo_rl_core import hookspecs
from nemo_rl_core.errors import PluginError
from nemo_rl_core.records.rollout import Rollout, RolloutError, RolloutGroup, Turn
from nemo_rl_core.records.run_state import RunState
from nemo_rl_core.records.to_batch import batch_from_groups
from nemo_rl_core.registry import ComponentRef, RunHooks
from nemo_rl_core.schema import RunConfig
from nemo_rl_core.testing.conformance.frame.declared import overlaid
from nemo_rl_core.testing.conformance.frame.kit import Contract

__all__ = ["CallbackContract"]

HOOKS: dict[str, tuple[str, ...]] = {
    name: tuple(inspect.signature(function).parameters)
    for name, function in vars(hookspecs).items()
    if name.startswith("on_") and hasattr(function, "nemo_rl_spec")
}
"""The lifecycle hooks and their arguments."""

METRICS = {"train/loss": 0.5, "train/grad_norm": 1.0, "train/reward": 0.25, "timing/total": 1.5}
VALIDATION = {"validation/accuracy": 0.5, "validation/reward": 0.5}

Event = tuple[str, dict[str, Any]]


class CallbackContract(Contract):
    """What every callback must be. Define the fixture `callback`.

    Attributes:
        metrics: Metrics of a step beside the usual ones, as your callback reads them.
    """

    kind: ClassVar[str] = "callbacks"
    subject: ClassVar[str] = "callback"
    metrics: ClassVar[Mapping[str, float]] = {}

    @classmethod
    def from_component(cls, ref: ComponentRef, options: Mapping[str, Any], example: Mapping[str, Any]) -> object:
        """Return the object, or an object of the class, made with the options as arguments."""
        component = ref.load()
        return component(**overlaid(example, options)) if isinstance(component, type) else component

    @classmethod
    def mistake_in(cls, subject: object) -> str | None:
        """Refuse a class: a callback is an object."""
        if isinstance(subject, type):
            return f"it returns the class {subject.__name__}: return an object, such as {subject.__name__}()"
        return super().mistake_in(subject)

    # -- clauses: what it listens to -------------------------------------------------------------

    def test_listens_to_something(self, callback: object) -> None:
        """It implements one hook of a run at least."""
        assert any(hasattr(callback, name) for name in HOOKS), (
            f"it has none of the hooks {', '.join(HOOKS)}, so it is never called"
        )

    def test_hooks_exist(self, callback: object) -> None:
        """Every method whose name begins with `on_` is a hook."""
        unknown = [name for name, _ in _methods(callback) if name not in HOOKS]
        assert not unknown, f"{', '.join(unknown)} is no hook; the hooks are {', '.join(HOOKS)}"

    def test_arguments_are_known(self, callback: object) -> None:
        """Each hook asks only for arguments that it is given."""
        for name, method in _methods(callback):
            for parameter in inspect.signature(method).parameters.values():
                free = parameter.default is not parameter.empty or parameter.kind in (
                    parameter.VAR_KEYWORD,
                    parameter.VAR_POSITIONAL,
                )
                known = HOOKS.get(name, (parameter.name,))
                assert free or parameter.name in known, f"{name} asks for {parameter.name!r}; it is given {known}"

    def test_registers(self, callback: object) -> None:
        """A run takes it as a listener: its hooks are plain functions, neither async nor wrappers."""
        for name, method in _methods(callback):
            assert not inspect.iscoroutinefunction(method), f"{name} is async; hooks are called, not awaited"
        try:
            RunHooks([callback], installed=False)
        except PluginError as error:
            raise AssertionError(str(error)) from error

    def test_says_whether_it_is_critical(self, callback: object) -> None:
        """`critical`, if it has it, is True or False: whether its exceptions end the run."""
        found = getattr(callback, "critical", False)
        assert isinstance(found, bool), f"critical is {found!r}"

    # -- clauses: through a run --------------------------------------------------------------------

    def test_whole_run(self, callback: object, tmp_path: Path) -> None:
        """It takes every event of a run without raising: steps, validation, checkpoints, the end."""
        self._play(callback, _run(self._state(tmp_path), self._step_metrics()))

    def test_failed_rollouts(self, callback: object, tmp_path: Path) -> None:
        """It takes rollouts that failed, have no reward, or sampled nothing."""
        run = self._state(tmp_path)
        groups = [
            RolloutGroup(group_id=0, task_id="a", rollouts=[_failed(), _empty()]),
            RolloutGroup(group_id=1, task_id="b"),
        ]
        self._play(callback, [("on_run_start", {"run": run}), ("on_rollouts", {"run": run, "groups": groups})])

    def test_run_without_a_step(self, callback: object, tmp_path: Path) -> None:
        """It takes a run that is interrupted before its first step."""
        run = self._state(tmp_path)
        self._play(callback, [("on_run_start", {"run": run}), ("on_run_end", {"run": run, "status": "interrupted"})])

    def test_failed_run(self, callback: object, tmp_path: Path) -> None:
        """It takes a run that fails, in its set-up or in a step."""
        run = self._state(tmp_path)
        error = {"run": run, "error": RuntimeError("out of memory")}
        end = {"run": run, "status": "failed"}
        self._play(callback, [("on_error", error), ("on_run_end", end)])
        start: list[Event] = [("on_run_start", {"run": run}), ("on_step_start", {"run": run})]
        self._play(callback, [*start, ("on_error", error), ("on_run_end", end)])

    def test_metrics_may_be_missing(self, callback: object, tmp_path: Path) -> None:
        """It does not count on a metric that another algorithm or step does not have."""
        self._play(callback, _run(self._state(tmp_path), {}))

    def test_second_run(self, callback: object, tmp_path: Path) -> None:
        """The same object can listen to a second run."""
        for number in (1, 2):
            try:
                self._play(callback, _run(self._state(tmp_path / str(number)), self._step_metrics()))
            except AssertionError as error:
                raise AssertionError(f"in run {number}: {error}") from error

    def test_leaves_the_run_alone(self, callback: object, tmp_path: Path) -> None:
        """It changes nothing of the run but `stop_requested` and `checkpoint_requested`, and no metric."""
        run = self._state(tmp_path)
        for hook, arguments in _run(run, self._step_metrics()):
            before = {name: _frozen(value) for name, value in arguments.items()}
            self._play(callback, [(hook, arguments)])
            for name, value in arguments.items():
                changed = _changed(before[name], _frozen(value))
                assert not changed, f"{hook} changed {', '.join(f'{name}.{field}' for field in changed)}"

    # -- playing -----------------------------------------------------------------------------------

    def _state(self, run_dir: Path) -> RunState:
        run_dir.mkdir(parents=True, exist_ok=True)
        return RunState(config=RunConfig(algorithm="x"), run_dir=run_dir, algorithm="x", max_steps=2)

    def _step_metrics(self) -> dict[str, float]:
        return {**METRICS, **self.metrics}

    def _play(self, callback: object, events: Iterable[Event]) -> None:
        """Call the hooks as a run does; the first exception of the callback fails the clause."""
        hooks = RunHooks([callback], installed=False)
        for hook, arguments in events:
            try:
                hooks.call(hook, **arguments)
            except Exception as error:
                raise AssertionError(f"{hook} raised {type(error).__name__}: {error}, and it is critical") from error
            for failure in hooks.failures:
                raise AssertionError(f"{hook} raised {type(failure.error).__name__}: {failure.error}")


def _methods(callback: object) -> list[tuple[str, Callable[..., object]]]:
    """Return the methods of a callback whose names look like hooks, by name."""
    names = [name for name in dir(callback) if name.startswith("on_")]
    return [(name, getattr(callback, name)) for name in names if callable(getattr(callback, name))]


def _run(run: RunState, metrics: Mapping[str, float]) -> Iterator[Event]:
    """Yield every event of a run of two steps, in order."""
    yield "on_run_start", {"run": run}
    for step in (1, 2):
        groups = [RolloutGroup(group_id=step, task_id="a", rollouts=[_rollout(0), _rollout(1)])]
        yield "on_step_start", {"run": run}
        yield "on_rollouts", {"run": run, "groups": groups}
        yield "on_batch", {"run": run, "batch": batch_from_groups(groups)}
        yield "on_train_step", {"run": run, "metrics": {k: v for k, v in metrics.items() if k.startswith("train/")}}
        run.weight_version = run.step = step
        yield "on_refit", {"run": run, "version": step}
        yield "on_validation", {"run": run, "metrics": dict(VALIDATION) if metrics else {}}
        yield "on_checkpoint", {"run": run, "path": run.run_dir / f"step_{step}"}
        run.history.append({"step": float(step), **metrics})
        yield "on_step_end", {"run": run, "metrics": dict(metrics)}
    yield "on_run_end", {"run": run, "status": "completed"}


def _rollout(index: int) -> Rollout:
    turns = [
        Turn(message={"role": "user", "content": "2 + 2?"}, token_ids=[3, 4], sampled=False),
        Turn(message={"role": "assistant", "content": "4"}, token_ids=[5, 1], sampled=True, logprobs=[-0.5, -0.25]),
    ]
    return Rollout(
        rollout_id=f"a/{index}", task_id="a", index=index, seed=1, segments=[turns], rewards={"reward": float(index)}
    )


def _failed() -> Rollout:
    error = RolloutError(stage="score", type="RewardError", message="no answer")
    return Rollout(rollout_id="a/0", task_id="a", index=0, seed=1, error=error)


def _empty() -> Rollout:
    turn = Turn(message={"role": "assistant", "content": ""}, token_ids=[], sampled=True)
    return Rollout(rollout_id="a/1", task_id="a", index=1, seed=1, segments=[[turn]])


def _frozen(value: object) -> dict[str, Any]:
    """Copy what a callback may not change, by field."""
    if isinstance(value, RunState):
        skipped = ("stop_requested", "checkpoint_requested", "config")
        return {f.name: copy.deepcopy(getattr(value, f.name)) for f in attrs.fields(RunState) if f.name not in skipped}
    return {"value": copy.deepcopy(value)} if isinstance(value, Mapping | list) else {}


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [name for name, value in before.items() if after[name] != value]
