"""Validation, once for all algorithms: sample and score, or evaluate the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.rollouts.failures import check_failures
from nemo_rl_core.rollouts.metrics import rollout_metrics
from nemo_rl_core.rollouts.scores import Scoring, score_groups

if TYPE_CHECKING:
    from nemo_rl_core.data.module import DataModule
    from nemo_rl_core.data.order import TaskItem
    from nemo_rl_core.protocols.algorithm import Algorithm, Model
    from nemo_rl_core.protocols.generation_backend import SamplingParams
    from nemo_rl_core.records.rollout import RolloutGroup
    from nemo_rl_core.rollouts.runner import RolloutRunner
    from nemo_rl_core.schema import ValidationConfig
    from nemo_rl_core.training.model.policy import Policy

__all__ = ["sample_groups", "validate_loss", "validate_rollouts"]

_FIRST_ID = 1 << 40
"""Group ids of validation start here, so that their seeds differ from training's."""
_IDS_PER_RUN = 1 << 32


def sample_groups(
    runner: RolloutRunner,
    items: Sequence[TaskItem],
    *,
    group_size: int,
    sampling: SamplingParams,
    weight_version: int,
    max_failed_fraction: float,
    run: int = 0,
) -> list[RolloutGroup]:
    """Sample these prompts, `group_size` rollouts each.

    Args:
        runner: Runs the episodes.
        items: The prompts.
        group_size: Rollouts per prompt.
        sampling: How completions are drawn.
        weight_version: Stamp of the engine's weights.
        max_failed_fraction: Of the rollouts; more of them failing is an error.
        run: The seeds of each run are its own.

    Raises:
        EnvironmentFailure: Too many rollouts failed.
    """
    with runner.gathering():
        futures = [
            runner.submit(
                _FIRST_ID + run * _IDS_PER_RUN + item.index,
                item.task_id,
                item.task,
                group_size=group_size,
                weight_version=weight_version,
                sampling=sampling,
            )
            for item in items
        ]
    groups = [future.result() for future in futures]
    check_failures(groups, max_failed_fraction)
    return groups


def validate_rollouts(
    runner: RolloutRunner,
    data: DataModule,
    config: ValidationConfig,
    *,
    sampling: SamplingParams,
    weight_version: int,
    max_failed_fraction: float,
    correct_reward: float = 1.0,
) -> tuple[dict[str, float], list[RolloutGroup]]:
    """Sample every validation prompt and average the rewards.

    Returns:
        `validation/accuracy` (mean reward), with n > 1 rollouts per prompt `validation/pass@<n>`, and the other
        rollout metrics under `validation/`; and the groups.
    """
    items = data.validation(config.max_samples)
    if not items:
        raise ConfigError("Validation is asked for, but there is no validation data. Set data.validation.")
    num = config.num_generations_per_prompt
    groups = sample_groups(
        runner,
        items,
        group_size=num,
        sampling=sampling,
        weight_version=weight_version,
        max_failed_fraction=max_failed_fraction,
    )
    scoring = Scoring(pass_at=(num,) if num > 1 else (), correct_reward=correct_reward)
    metrics = {**rollout_metrics(groups), **score_groups(groups, scoring)}
    values = {f"validation/{name.removeprefix('rollouts/')}": value for name, value in metrics.items()}
    values["validation/num_samples"] = values.pop("validation/num_prompts")
    return values, groups


def validate_loss(
    policy: Policy, models: Mapping[str, Model], algorithm: Algorithm, data: DataModule, config: ValidationConfig
) -> dict[str, float]:
    """The loss over the validation rows, weighted as in training."""
    items = data.validation(config.max_samples)
    if not items:
        raise ConfigError("Validation is asked for, but there is no validation data. Set data.validation.")
    batch = algorithm.build_batch([item.task for item in items])
    algorithm.fill_batch(batch, models)
    algorithm.finish_batch(batch)
    metrics = policy.train_step(batch, algorithm.loss, update=False)
    return {f"validation/{name}": value for name, value in metrics.items()}
