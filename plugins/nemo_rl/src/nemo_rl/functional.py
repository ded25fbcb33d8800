"""One-call functions over the trainers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nemo_rl_core.training.trainer import Trainer

if TYPE_CHECKING:
    from nemo_rl_core.protocols.reward import Reward
    from nemo_rl_core.records.run_state import RunResult

__all__ = ["evaluate", "train"]


def train(
    model: str | None = None,
    dataset: Any = None,
    reward_fn: Reward | None = None,
    *,
    algorithm: str = "grpo",
    config: Any = None,
    environment: Any = None,
    validation_dataset: Any = None,
    callbacks: Sequence[Any] = (),
    **fields: Any,
) -> RunResult:
    """Train a model with one call.

        nemo_rl.train("scratch:qwen2-1m", [{"prompt": "1 + 1 =", "answer": "2"}],
                      lambda response, answer: float(response.strip() == answer))

    Args:
        model: Hub name, local folder or `scratch:<name>`.
        dataset: Rows, a file, a folder or a hub name; by default what the configuration says.
        reward_fn: Scores a response; arguments are matched by name (`prompt`, `response`, any column).
        algorithm: Name of the algorithm, unless `config` says it.
        config: A configuration object, mapping or file to start from.
        environment: An environment class instead of a reward function.
        validation_dataset: As `dataset`, for validation.
        callbacks: `Callback` objects.
        **fields: Fields of the configuration, dotted ones included.

    Returns:
        The run's result.
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
    dataset: Any = None,
    reward_fn: Reward | None = None,
    *,
    algorithm: str = "grpo",
    config: Any = None,
    environment: Any = None,
    **fields: Any,
) -> dict[str, float]:
    """Sample every row of a dataset and score the responses, without training.

    Args:
        model: Hub name, local folder or `scratch:<name>`.
        dataset: Rows, a file, a folder or a hub name; by default the validation data of the configuration.
        reward_fn: See `train`.
        algorithm: Whose configuration class reads `fields`.
        config: A configuration object, mapping or file to start from.
        environment: An environment class instead of a reward function.
        **fields: Fields of the configuration, such as `**{"validation.num_generations_per_prompt": 4}`.

    Returns:
        Metrics by name: `accuracy` (mean reward) and the statistics of the rollouts.
    """
    if model is not None:
        fields["model"] = model
    trainer = Trainer({"algorithm": algorithm} if config is None else config, **fields)
    return trainer.evaluate(dataset, reward_fn, environment=environment).metrics
