"""Validation, once for all algorithms: sample and score, or evaluate the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_rl_core._errors import ConfigError
from nemo_rl_core.rollouts.metrics import rollout_metrics
from nemo_rl_core.training.failures import check_failures

if TYPE_CHECKING:
    from nemo_rl_core.config.schema import ValidationConfig
    from nemo_rl_core.data.module import DataModule
    from nemo_rl_core.protocols.algorithm import Algorithm
    from nemo_rl_core.protocols.generation_backend import SamplingParams
    from nemo_rl_core.rollouts.records import RolloutGroup
    from nemo_rl_core.rollouts.runner import RolloutRunner
    from nemo_rl_core.training.policy import Policy

__all__ = ["validate_loss", "validate_rollouts"]

_FIRST_ID = 1 << 40
"""Group ids of validation start here, so that their seeds differ from training's."""


def validate_rollouts(
    runner: RolloutRunner,
    data: DataModule,
    config: ValidationConfig,
    *,
    sampling: SamplingParams,
    weight_version: int,
    max_failed_fraction: float,
) -> tuple[dict[str, float], list[RolloutGroup]]:
    """Sample every validation prompt and average the rewards.

    Returns:
        `validation/accuracy` (mean reward) and the other rollout metrics under `validation/`, and the groups.
    """
    items = data.validation(config.max_samples)
    if not items:
        raise ConfigError("Validation is asked for, but there is no validation data. Set data.validation.")
    with runner.gathering():
        futures = [
            runner.submit(
                _FIRST_ID + item.index,
                item.task_id,
                item.task,
                group_size=config.num_generations_per_prompt,
                weight_version=weight_version,
                sampling=sampling,
            )
            for item in items
        ]
    groups = [future.result() for future in futures]
    check_failures(groups, max_failed_fraction)
    metrics = rollout_metrics(groups)
    rewards = [rollout.reward for group in groups for rollout in group.valid]
    values = {f"validation/{name.removeprefix('rollouts/')}": value for name, value in metrics.items()}
    if rewards:
        values["validation/accuracy"] = sum(rewards) / len(rewards)
    values["validation/num_samples"] = float(len(items))
    return values, groups


def validate_loss(policy: Policy, algorithm: Algorithm, data: DataModule, config: ValidationConfig) -> dict[str, float]:
    """The loss over the validation rows, weighted as in training."""
    items = data.validation(config.max_samples)
    if not items:
        raise ConfigError("Validation is asked for, but there is no validation data. Set data.validation.")
    batch = algorithm.build_batch([item.task for item in items])
    algorithm.finish_batch(batch)
    metrics = policy.train_step(batch, algorithm.loss, update=False)
    return {f"validation/{name}": value for name, value in metrics.items()}
