"""Evaluation: sample a dataset with a model and score the responses, without training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import fsum, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve, field, frozen

from nemo_rl_core.errors import ConfigError, DataError
from nemo_rl_core.records.run_state import Sample
from nemo_rl_core.rollouts.metrics import rollout_metrics
from nemo_rl_core.rollouts.scores import Scoring, score_groups
from nemo_rl_core.training.setup.assemble import assemble
from nemo_rl_core.training.setup.parts import RunInputs, RunParts, SamplingChanges, sampling_params
from nemo_rl_core.training.steps.validation import sample_groups

if TYPE_CHECKING:
    from nemo_rl_core.data.order import TaskItem
    from nemo_rl_core.records.rollout import RolloutGroup
    from nemo_rl_core.schema import RunConfig

__all__ = ["EvaluationResult", "evaluate"]


@frozen(kw_only=True)
class EvaluationResult:
    """Result of an evaluation."""

    metrics: dict[str, float]
    """`accuracy` (mean reward), `pass@<k>`, `cons@<k>` and the statistics of the rollouts; means over the runs."""
    samples: list[Sample]
    """One response per prompt, of the first run."""
    records: Path | None = None
    """File with every rollout, if one was asked for."""
    std: dict[str, float] = field(factory=dict)
    """Standard deviation of each metric over the runs (n - 1 below); empty for one run."""
    runs: list[dict[str, float]] = field(factory=list)
    """Metrics of each run."""
    subsets: dict[str, dict[str, float]] = field(factory=dict)
    """Scores of each subset, means over the runs; empty without `evaluation.subset_column`."""
    subset_std: dict[str, dict[str, float]] = field(factory=dict)
    """Their standard deviations over the runs."""


def evaluate(config: RunConfig, inputs: RunInputs, *, output: Path | None = None) -> EvaluationResult:
    """Sample every row of the validation data (of the training data if there is none) and score it.

    Args:
        config: Finalized configuration; `evaluation` says how to sample and what to count, `validation` the rest.
        inputs: Python objects that replace configured ones.
        output: JSON-lines file for the rollouts of all runs.

    Raises:
        ConfigError: There is no data, or answers that are to vote cannot be told.
        DataError: The data cannot be read, or a row does not name its subset.
    """
    if config.data.validation is None and inputs.validation_rows is None:
        config = evolve(config, data=evolve(config.data, validation=config.data.train))
        inputs.validation_rows = inputs.train_rows
        if config.data.train.source is None and inputs.train_rows is None:
            raise ConfigError(
                "There is no data to evaluate on. Set data.validation.source to a file, a folder or a dataset, or pass "
                "rows to Trainer.evaluate()."
            )
    options = config.evaluation
    parts = assemble(config, inputs, run_dir=config.run_dir or ".", training=False)
    try:
        items = parts.data.validation(options.max_samples)
        subset_of = _subsets(items, options.subset_column)
        runs = [_sample(parts, items, run) for run in range(options.num_runs)]
    finally:
        parts.close()
    if output is not None:
        from nemo_rl_core.records.jsonl import write_groups

        output.parent.mkdir(parents=True, exist_ok=True)
        write_groups(output, [group for groups in runs for group in groups])
    scoring = _scoring(config, runs[0])
    metrics = [_metrics(groups, scoring) for groups in runs]
    subsets = {
        name: [score_groups([groups[i] for i in members], scoring) for groups in runs]
        for name, members in subset_of.items()
    }
    mean, std = _mean_and_std(metrics)
    by_subset = {name: _mean_and_std(found) for name, found in subsets.items()}
    return EvaluationResult(
        metrics=mean,
        std=std,
        runs=metrics,
        subsets={name: found[0] for name, found in by_subset.items()},
        subset_std={name: found[1] for name, found in by_subset.items() if found[1]},
        samples=_samples(runs[0]),
        records=output,
    )


def _num_generations(config: RunConfig) -> int:
    return config.evaluation.num_generations_per_prompt or config.validation.num_generations_per_prompt


def _sample(parts: RunParts, items: Sequence[TaskItem], run: int) -> list[RolloutGroup]:
    """The groups of one run, one for each item in their order."""
    assert parts.runner is not None
    config = parts.config
    options, validation = config.evaluation, config.validation
    changes: SamplingChanges = {
        "temperature": validation.temperature if options.temperature is None else options.temperature
    }
    if max_new_tokens := options.max_new_tokens or validation.max_new_tokens:
        changes["max_new_tokens"] = max_new_tokens
    return sample_groups(
        parts.runner,
        items,
        group_size=_num_generations(config),
        sampling=sampling_params(config, **changes),
        weight_version=0,
        max_failed_fraction=config.rollouts.max_failed_fraction,
        run=run,
    )


def _subsets(items: Sequence[TaskItem], column: str | None) -> dict[str, list[int]]:
    """Places of the items of each subset, by the name in their column; in the order of the names."""
    if column is None:
        return {}
    places: dict[str, list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        if column not in item.task:
            raise DataError(
                f"evaluation.subset_column is {column!r}, but row {item.index} has no such column. It has: "
                f"{', '.join(map(repr, item.task))}."
            )
        places[str(item.task[column])].append(place)
    return dict(sorted(places.items()))


def _scoring(config: RunConfig, groups: Sequence[RolloutGroup]) -> Scoring:
    """Choose the scores; cons@k by default only if some rollout has an answer.

    Raises:
        ConfigError: cons@k is asked for, and no rollout has an answer.
    """
    options, num = config.evaluation, _num_generations(config)
    scoring = Scoring(
        pass_at=options.pass_at or tuple(dict.fromkeys((1, num))),
        cons_at=options.cons_at or ((num,) if num > 1 else ()),
        correct_reward=options.correct_reward,
        answer_key=options.answer_key,
        answer_pattern=options.answer_pattern,
    )
    if not scoring.cons_at or any(scoring.answer(r) is not None for group in groups for r in group.valid):
        return scoring
    if options.cons_at:
        where = f"in the info of any rollout at {options.answer_key!r} (evaluation.answer_key)"
        if options.answer_pattern is not None:
            where = f"by {options.answer_pattern!r} (evaluation.answer_pattern) in any response"
        raise ConfigError(
            f"evaluation.cons_at asks for the most frequent answer, but no answer was found {where}. Set "
            r"evaluation.answer_pattern to a regular expression that finds it, such as '\\boxed\{(.*?)\}'."
        )
    return evolve(scoring, cons_at=())


def _metrics(groups: Sequence[RolloutGroup], scoring: Scoring) -> dict[str, float]:
    metrics = {name.removeprefix("rollouts/"): value for name, value in rollout_metrics(groups).items()}
    metrics.update(score_groups(groups, scoring))
    metrics["num_samples"] = metrics.pop("num_prompts")
    return metrics


def _mean_and_std(runs: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Of each metric over the runs that have it; no standard deviation of one run."""
    values: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        for name, value in run.items():
            values[name].append(value)
    mean = {name: fsum(found) / len(found) for name, found in values.items()}
    std = {
        name: sqrt(fsum((x - mean[name]) ** 2 for x in found) / (len(found) - 1))
        for name, found in values.items()
        if len(found) > 1
    }
    return mean, std


def _samples(groups: Sequence[RolloutGroup]) -> list[Sample]:
    return [
        Sample(
            prompt=str(rollout.messages[0].get("content", "")) if rollout.messages else "",
            response=rollout.response,
            reward=rollout.reward,
            step=0,
        )
        for group in groups
        for rollout in group.valid[:1]
    ]
