"""Evaluation: sample a dataset with a model and score the responses, without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from nemo_rl_core.training.assembly import RunInputs, assemble, sampling_params
from nemo_rl_core.training.state import Sample
from nemo_rl_core.training.validation import validate_rollouts

if TYPE_CHECKING:
    from nemo_rl_core.config.schema import RunConfig

__all__ = ["EvaluationResult", "evaluate"]


@frozen(kw_only=True)
class EvaluationResult:
    """What an evaluation found."""

    metrics: dict[str, float]
    """`accuracy` (mean reward) and the statistics of the rollouts."""
    samples: list[Sample]
    """One response per prompt."""
    records: Path | None = None
    """File with every rollout, if one was asked for."""


def evaluate(config: RunConfig, inputs: RunInputs, *, output: Path | None = None) -> EvaluationResult:
    """Sample every row of the validation data (of the training data if there is none) and score it.

    Args:
        config: Finalized configuration; `validation` says how to sample.
        inputs: Python objects that stand in for configured ones.
        output: JSON-lines file for the rollouts.
    """
    if config.data.validation is None and inputs.validation_rows is None:
        config = evolve(config, data=evolve(config.data, validation=config.data.train))
        inputs.validation_rows = inputs.train_rows
    parts = assemble(config, inputs, run_dir=config.run_dir or ".", training=False)
    try:
        assert parts.runner is not None
        changes: dict[str, Any] = {"temperature": config.validation.temperature}
        if config.validation.max_new_tokens is not None:
            changes["max_new_tokens"] = config.validation.max_new_tokens
        metrics, groups = validate_rollouts(
            parts.runner,
            parts.data,
            config.validation,
            sampling=sampling_params(config, **changes),
            weight_version=0,
            max_failed_fraction=config.rollouts.max_failed_fraction,
        )
    finally:
        parts.close()
    if output is not None:
        from nemo_rl_core.rollouts.jsonl import write_groups

        output.parent.mkdir(parents=True, exist_ok=True)
        write_groups(output, groups)
    samples = [
        Sample(
            prompt=str(rollout.messages[0].get("content", "")) if rollout.messages else "",
            response=rollout.response,
            reward=rollout.reward,
            step=0,
        )
        for group in groups
        for rollout in group.valid[:1]
    ]
    return EvaluationResult(
        metrics={name.removeprefix("validation/"): value for name, value in metrics.items()},
        samples=samples,
        records=output,
    )
