"""`Trainer`: the public way to run any algorithm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.config.schema import RunConfig
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.training.state import RunResult, RunState
from nemo_rl_core.training.tracing import traced

if TYPE_CHECKING:
    from nemo_rl_core.protocols.reward import Reward
    from nemo_rl_core.registry import ComponentRef
    from nemo_rl_core.training.assembly import RunInputs
    from nemo_rl_core.training.evaluation import EvaluationResult
    from nemo_rl_core.training.replay import RecordedRollouts

__all__ = ["Trainer", "default_run_dir", "run"]

Self = TypeVar("Self", bound="Trainer")


class Trainer:
    """Runs the algorithm that its configuration names.

    Args:
        config: A configuration object, a mapping, or the path of a YAML, JSON or TOML file.
        **fields: Fields to set over it, also dotted ones: `Trainer(path, **{"policy.optimizer.lr": 1e-5})`.

    Raises:
        ConfigError: With every mistake found.
    """

    algorithm: ClassVar[str | None] = None
    """Name of the algorithm; sub-classes fix it."""

    def __init__(self, config: RunConfig | Mapping[str, Any] | str | Path, **fields: Any) -> None:
        if isinstance(config, Mapping) and self.algorithm is not None:
            config = {"algorithm": self.algorithm, **config}
        self.config: RunConfig = finalize(load_config(config, overrides=fields))
        if self.algorithm is not None and self.config.algorithm != self.algorithm:
            raise ConfigError(
                f"{type(self).__name__} runs {self.algorithm!r}, but the configuration says algorithm: "
                f"{self.config.algorithm!r}. Use nemo_rl_core.training.Trainer, which runs any."
            )

    @classmethod
    def from_pretrained(cls: type[Self], model: str | Path, **fields: Any) -> Self:
        """A trainer with the defaults of its algorithm for one model.

        Args:
            model: Hub name, local folder, or `scratch:<name>`. A folder or file that holds a run's
                configuration (`config.json` written by a run, or a YAML file) is taken with all it says.
            **fields: Fields of the configuration, such as `num_prompts_per_step=8`.
        """
        path = Path(model).expanduser()
        if path.suffix in (".yaml", ".yml", ".toml") and path.is_file():
            return cls(path, **fields)
        return cls({"model": str(model)}, **fields)

    def fit(
        self,
        train_dataset: Any = None,
        reward_fn: Reward | None = None,
        *,
        dataset: Any = None,
        environment: Any = None,
        validation_dataset: Any = None,
        rollouts: Any = None,
        callbacks: Sequence[Any] = (),
        debug: bool | None = None,
    ) -> RunResult:
        """Train.

        Args:
            train_dataset: Rows, or the name of a dataset (hub name, file, folder); by default what the
                configuration says. `dataset` is another name for it.
            reward_fn: A plain function that scores a response; arguments are matched by name.
            dataset: See `train_dataset`.
            environment: An environment class instead of a reward function.
            validation_dataset: As `train_dataset`, for validation.
            rollouts: Train on recorded rollouts instead of sampling: a file, the folder of a run, or groups. No
                engine, environment or data is needed.
            callbacks: `Callback` objects, called at the events of this run.
            debug: Write which plugin's code ran when to `debug.jsonl` in the run folder and to the logger
                `nemo_rl_core.debug`; None is what NEMO_RL_DEBUG says.

        Returns:
            The result; `status` is "interrupted" after Ctrl-C (the state was saved).
        """
        from nemo_rl_core.training.assembly import RunInputs

        if train_dataset is not None and dataset is not None:
            raise ConfigError("Both train_dataset and dataset are given; they are two names for one argument.")
        config, train_rows = self._with_data(train_dataset if dataset is None else dataset)
        validation_rows = None
        if isinstance(validation_dataset, str):
            config = _set(config, "data.validation.source", validation_dataset)
        else:
            validation_rows = validation_dataset
        inputs = RunInputs(
            train_rows=train_rows, validation_rows=validation_rows, reward=reward_fn, environment=environment
        )
        if rollouts is not None:
            inputs.recorded = _recorded(rollouts)
        return run(config, inputs, callbacks, debug=debug)

    def evaluate(
        self,
        dataset: Any = None,
        reward_fn: Reward | None = None,
        *,
        environment: Any = None,
        output: str | Path | None = None,
    ) -> EvaluationResult:
        """Sample every row of a dataset with the configured model and score it, without training.

        Args:
            dataset: Rows, or the name of a dataset; by default the configuration's validation data.
            reward_fn: Scores a response, as in `fit`.
            environment: An environment class instead of a reward function.
            output: JSON-lines file for the rollouts.
        """
        from nemo_rl_core.training.assembly import RunInputs
        from nemo_rl_core.training.evaluation import evaluate

        config, rows = self.config, dataset
        if isinstance(dataset, (str, Path)):
            config, rows = _set(config, "data.validation.source", str(dataset)), None
        inputs = RunInputs(validation_rows=rows, reward=reward_fn, environment=environment)
        return evaluate(config, inputs, output=None if output is None else Path(output))

    def _with_data(self, rows: Any) -> tuple[RunConfig, Any]:
        if isinstance(rows, (str, Path)):
            return _set(self.config, "data.train.source", str(rows)), None
        return self.config, rows


def _set(config: RunConfig, path: str, value: Any) -> RunConfig:
    return finalize(load_config(config, overrides={path: value}))


def _recorded(rollouts: Any) -> RecordedRollouts:
    from nemo_rl_core.training.replay import RecordedRollouts, read_recorded

    if isinstance(rollouts, (str, Path)):
        return read_recorded(rollouts)
    if isinstance(rollouts, RecordedRollouts):
        return rollouts
    return RecordedRollouts(source="the rollouts given", groups=list(rollouts))


def default_run_dir(config: RunConfig) -> Path:
    """`run_dir`, or `runs/<name>`."""
    return Path(config.run_dir or f"runs/{config.name or config.algorithm}").expanduser()


def run(config: RunConfig, inputs: RunInputs, callbacks: Sequence[Any] = (), *, debug: bool | None = None) -> RunResult:
    """Assemble and run a finalized configuration.

    Args:
        config: What to run.
        inputs: Python objects that stand in for configured ones.
        callbacks: Listeners of this run.
        debug: Trace which plugin's code runs when; None is what NEMO_RL_DEBUG says.
    """
    with traced(default_run_dir(config), debug):
        return _run(config, inputs, callbacks)


def _run(config: RunConfig, inputs: RunInputs, callbacks: Sequence[Any]) -> RunResult:
    from nemo_rl_core.registry import RunHooks
    from nemo_rl_core.training.assembly import assemble
    from nemo_rl_core.training.loop import RunLoop
    from nemo_rl_core.training.progress import make_progress
    from nemo_rl_core.training.record import RunRecord
    from nemo_rl_core.training.replay import replay_config
    from nemo_rl_core.training.run_folder import check_run_folder

    if inputs.recorded is not None:
        config = replay_config(config)
    run_dir = default_run_dir(config)
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


def _loggers(config: RunConfig, used: list[ComponentRef]) -> list[tuple[str, Any]]:
    from nemo_rl_core.registry import PluginCall, get_registry

    made = []
    for choice in config.logging.loggers:
        ref = get_registry().resolve("loggers", choice.name, plugins=config.plugins)
        used.append(ref)
        logger_class = ref.load()
        with PluginCall("loggers", ref, "__init__", "made"):
            made.append((ref.name, logger_class(choice.options)))
    return made
