"""`Trainer`: the public way to run any algorithm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.records.run_state import RunResult
from nemo_rl_core.schema import RunConfig
from nemo_rl_core.training.run import run

if TYPE_CHECKING:
    from nemo_rl_core.protocols.reward import Reward
    from nemo_rl_core.records.rollout import RolloutGroup
    from nemo_rl_core.rollouts.engine import EnvironmentFactory
    from nemo_rl_core.rollouts.recorded import RecordedRollouts
    from nemo_rl_core.training.evaluation import EvaluationResult

__all__ = ["Trainer"]

Self = TypeVar("Self", bound="Trainer")


class Trainer:
    """Runs the algorithm that its configuration names.

    Args:
        config: Configuration object, mapping, or path of a YAML, JSON or TOML file.
        **fields: Fields that override it, including dotted ones: `Trainer(path, **{"policy.optimizer.lr": 1e-5})`.

    Raises:
        ConfigError: With every mistake found.
    """

    algorithm: ClassVar[str | None] = None
    """Name of the algorithm; subclasses set it."""

    def __init__(self, config: RunConfig | Mapping[str, Any] | str | Path, **fields: object) -> None:
        if isinstance(config, Mapping) and self.algorithm is not None:
            config = {"algorithm": self.algorithm, **config}
        self.config: RunConfig = finalize(load_config(config, overrides=fields))
        if self.algorithm is not None and self.config.algorithm != self.algorithm:
            raise ConfigError(
                f"{type(self).__name__} runs {self.algorithm!r}, but the configuration says algorithm: "
                f"{self.config.algorithm!r}. Use nemo_rl_core.training.Trainer, which runs any."
            )

    @classmethod
    def from_pretrained(cls: type[Self], model: str | Path, **fields: object) -> Self:
        """Make a trainer with the defaults of its algorithm for one model.

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
        train_dataset: object = None,
        reward_fn: Reward | None = None,
        *,
        dataset: object = None,
        environment: EnvironmentFactory | type | None = None,
        validation_dataset: object = None,
        rollouts: str | Path | RecordedRollouts | Iterable[RolloutGroup] | None = None,
        callbacks: Sequence[Any] = (),
        debug: bool | None = None,
    ) -> RunResult:
        """Train.

        Args:
            train_dataset: Rows, or the name of a dataset (hub name, file, folder); by default the training
                data of the configuration. `dataset` is another name for it.
            reward_fn: Plain function that scores a response; arguments are matched by name.
            dataset: Another name for `train_dataset`.
            environment: An environment class instead of a reward function.
            validation_dataset: Validation data, in the same forms as `train_dataset`.
            rollouts: Train on recorded rollouts instead of sampling: a file, the folder of a run, or groups. No
                engine, environment or data is needed.
            callbacks: `Callback` objects, called at the events of this run.
            debug: Whether to write which plugin's code ran when to `debug.jsonl` in the run folder and to the logger
                `nemo_rl_core.debug`; None follows NEMO_RL_DEBUG.

        Returns:
            The result; `status` is "interrupted" after Ctrl-C (the state was saved).
        """
        from nemo_rl_core.training.setup.parts import RunInputs

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
        dataset: object = None,
        reward_fn: Reward | None = None,
        *,
        environment: EnvironmentFactory | type | None = None,
        output: str | Path | None = None,
    ) -> EvaluationResult:
        """Sample every row of a dataset with the configured model and score it, without training.

        Args:
            dataset: Rows, or the name of a dataset; by default the configuration's validation data.
            reward_fn: Scores a response, as in `fit`.
            environment: An environment class instead of a reward function.
            output: JSON-lines file for the rollouts.
        """
        from nemo_rl_core.training.evaluation import evaluate
        from nemo_rl_core.training.setup.parts import RunInputs

        config, rows = self.config, dataset
        if isinstance(dataset, (str, Path)):
            config, rows = _set(config, "data.validation.source", str(dataset)), None
        inputs = RunInputs(validation_rows=rows, reward=reward_fn, environment=environment)
        return evaluate(config, inputs, output=None if output is None else Path(output))

    def _with_data(self, rows: object) -> tuple[RunConfig, object]:
        if isinstance(rows, (str, Path)):
            return _set(self.config, "data.train.source", str(rows)), None
        return self.config, rows


def _set(config: RunConfig, path: str, value: object) -> RunConfig:
    return finalize(load_config(config, overrides={path: value}))


def _recorded(rollouts: str | Path | RecordedRollouts | Iterable[RolloutGroup]) -> RecordedRollouts:
    from nemo_rl_core.rollouts.recorded import RecordedRollouts, read_recorded

    if isinstance(rollouts, (str, Path)):
        return read_recorded(rollouts)
    if isinstance(rollouts, RecordedRollouts):
        return rollouts
    return RecordedRollouts(source="the rollouts given", groups=list(rollouts))
