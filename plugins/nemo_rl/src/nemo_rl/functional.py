"""Functions that train or evaluate with one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl_core.training.trainer import Trainer

if TYPE_CHECKING:
    from nemo_rl_core.protocols.reward import Reward
    from nemo_rl_core.records.run_state import RunResult
    from nemo_rl_core.rollouts.context import EnvironmentFactory
    from nemo_rl_core.schema import RunConfig

__all__ = ["evaluate", "train"]


def train(
    model: str | None = None,
    dataset: object = None,
    reward_fn: Reward | None = None,
    *,
    algorithm: str = "grpo",
    config: RunConfig | Mapping[str, Any] | str | Path | None = None,
    environment: EnvironmentFactory | type | None = None,
    validation_dataset: object = None,
    callbacks: Sequence[Any] = (),
    **fields: object,
) -> RunResult:
    """Train a model with one call.

        nemo_rl.train("scratch:qwen2-1m", [{"prompt": "1 + 1 =", "answer": "2"}],
                      lambda response, answer: float(response.strip() == answer))

    Args:
        model: Hub name, local folder or `scratch:<name>`.
        dataset: Rows, a file, a folder or a hub name. By default, the training data of the configuration.
        reward_fn: Function that scores a response; arguments are matched by name (`prompt`, `response`, any column).
        algorithm: Name of the algorithm; ignored if `config` is given.
        config: Configuration object, mapping or file to start from.
        environment: Environment class, instead of a reward function.
        validation_dataset: Validation data, in the same forms as `dataset`.
        callbacks: `Callback` objects that listen to this run.
        **fields: Fields of the configuration, including dotted ones such as `**{"policy.optimizer.lr": 1e-5}`.

    Returns:
        The result of the run.
    """
    if model is not None:
        fields["model"] = model
    trainer = Trainer({"algorithm": algorithm} if config is None else config, **fields)
    return trainer.fit(
        dataset,
        reward_fn,
        environment=environment,
        validation_dataset=validation_dataset,
        callbacks=callbacks,
    )


def evaluate(
    model: str | None = None,
    dataset: object = None,
    reward_fn: Reward | None = None,
    *,
    algorithm: str = "grpo",
    config: RunConfig | Mapping[str, Any] | str | Path | None = None,
    environment: EnvironmentFactory | type | None = None,
    **fields: object,
) -> dict[str, float]:
    """Sample every row of a dataset and score the responses, without training.

    Args:
        model: Hub name, local folder or `scratch:<name>`.
        dataset: Rows, a file, a folder or a hub name. By default, the validation data of the configuration.
        reward_fn: Function that scores a response, as in `train`.
        algorithm: Name of the algorithm whose configuration class reads `fields`; ignored if `config` is given.
        config: Configuration object, mapping or file to start from.
        environment: Environment class, instead of a reward function.
        **fields: Fields of the configuration, such as `**{"validation.num_generations_per_prompt": 4}`.

    Returns:
        Metrics by name: `accuracy` (mean reward) and the statistics of the rollouts.
    """
    if model is not None:
        fields["model"] = model
    trainer = Trainer({"algorithm": algorithm} if config is None else config, **fields)
    return trainer.evaluate(dataset, reward_fn, environment=environment).metrics
