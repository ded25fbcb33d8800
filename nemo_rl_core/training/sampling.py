"""Sampling of rollouts without a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nemo_rl_core.errors import DataError
from nemo_rl_core.records.jsonl import write_groups
from nemo_rl_core.rollouts.failures import check_failures
from nemo_rl_core.rollouts.metrics import rollout_metrics
from nemo_rl_core.schema import RunConfig

if TYPE_CHECKING:
    from nemo_rl_core.records.rollout import RolloutGroup
    from nemo_rl_core.training.setup.parts import RunInputs

__all__ = ["generate_rollouts"]


def generate_rollouts(
    config: RunConfig, inputs: RunInputs, out: Path, *, num_prompts: int | None = None
) -> dict[str, float]:
    """Sample the training prompts as the first steps of a run would, and write the rollouts; nothing is trained.

    The weights are those of the configured model, so the first step's rollouts equal those of a run's first step.

    Args:
        config: Finalized configuration.
        inputs: Python objects that replace configured ones.
        out: JSON-lines file; written group by group.
        num_prompts: Prompts to sample; None is those of one step.

    Returns:
        Metrics of the rollouts.

    Raises:
        EnvironmentFailure: More rollouts failed than `rollouts.max_failed_fraction` allows.
    """
    from nemo_rl_core.training.setup.assemble import assemble

    parts = assemble(config, inputs, run_dir=config.run_dir or ".", training=False)
    groups: list[RolloutGroup] = []
    left = num_prompts or config.num_items_per_step
    try:
        assert parts.runner is not None
        write_groups(out, [])
        while left > 0:
            items = parts.data.next(min(left, config.num_items_per_step))
            if items is None:
                raise DataError(f"The data ends {left} prompts early. Ask for fewer, or raise max_epochs.")
            left -= len(items)
            with parts.runner.gathering():
                futures = [
                    parts.runner.submit(
                        item.index, item.task_id, item.task, group_size=config.group_size, weight_version=0
                    )
                    for item in items
                ]
            sampled = [future.result() for future in futures]
            write_groups(out, sampled, append=True)
            check_failures(sampled, config.rollouts.max_failed_fraction)
            groups += sampled
    finally:
        parts.close()
    return rollout_metrics(groups)
