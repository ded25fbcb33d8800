"""Speeds of the parts of a cluster: given, or measured by a run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen
from attrs.validators import lt

from nemo_rl_core.errors import DataError
from nemo_rl_core.records.jsonl import read_groups
from nemo_rl_core.schema.validators import ge, gt, optional
from nemo_rl_core.training.reporting.record import read_metrics

__all__ = ["Rates", "rates_from_run"]

_NEEDED = {"timing/step", "performance/tokens_per_s", "rollouts/num", "rollouts/response_tokens_mean"}


@frozen(kw_only=True)
class Rates:
    """What a plan is computed from. None is not known."""

    engine_tokens_per_s: float | None = field(default=None, validator=optional(gt(0)))
    """New tokens of one engine at a full batch."""
    engine_batch: int = field(default=256, validator=ge(1))
    """Sequences that one engine decodes together."""
    sequence_tokens_per_s: float | None = field(default=None, validator=optional(gt(0)))
    """New tokens of one sequence, however few there are beside it; None is no limit."""
    trainer_tokens_per_s: float | None = field(default=None, validator=optional(gt(0)))
    """Prompt and response tokens of one training worker, all passes of a step and its logprobs included."""
    response_tokens: float | None = field(default=None, validator=optional(gt(0)))
    """Mean of one turn."""
    response_spread: float = field(default=0.5, validator=ge(0))
    """Standard deviation over mean of the response lengths."""
    prompt_tokens: float = field(default=0.0, validator=ge(0))
    """Mean."""
    turns: float = field(default=1.0, validator=ge(1))
    """Of an episode, mean."""
    refused_groups: float = field(default=0.0, validator=[ge(0), lt(1)])
    """Share of the groups that the algorithm refuses (dynamic sampling), in whose place others are sampled."""
    environment_s: float = field(default=0.0, validator=ge(0))
    """Seconds of one answer of the environment or reward."""
    refit_s: float = field(default=0.0, validator=ge(0))
    """Seconds of one weight update."""
    overhead_s: float = field(default=0.0, validator=ge(0))
    """Seconds of a step beside training: building batches, records."""


def rates_from_run(run_dir: Path) -> dict[str, Any]:
    """What the recorded metrics of a run say: fields of `Rates` by name.

    Means over its steps, which add up to the mean step, without the first, which warms up. An engine's speed is that
    of the time in which the engines had requests, divided by their number; with a batch that was not full it was faster
    for each sequence and slower in all than it can be.

    Raises:
        DataError: There are no metrics of rollouts in the folder.
    """
    steps = [m for m in read_metrics(run_dir) if m.keys() >= _NEEDED]
    if not steps:
        raise DataError(
            f"{run_dir} holds no metrics of a run that sampled rollouts (metrics.jsonl). Name the run folder of one, "
            "or give the rates (--engine-tokens-per-s, --trainer-tokens-per-s, --response-tokens)."
        )
    steps = steps[1:] or steps
    config = _config(run_dir)
    workers = int(config.get("policy", {}).get("num_workers", 1))
    response, rollouts = _mean(steps, "rollouts/response_tokens_mean"), _mean(steps, "rollouts/num")
    tokens = statistics.fmean(m["performance/tokens_per_s"] * m["timing/step"] for m in steps)
    training = statistics.fmean(m.get("timing/train", 0.0) + m.get("timing/logprobs", 0.0) for m in steps)
    sampling = statistics.fmean(_sampling_s(m) for m in steps)
    turns = max(1.0, _mean(steps, "rollouts/turns_mean"))
    refused = statistics.fmean(_refused(m) for m in steps)
    measured: dict[str, Any] = {
        "response_tokens": response / turns,
        "prompt_tokens": max(tokens / (rollouts * (1 - refused)) - response, 0.0),
        "turns": turns,
        "refused_groups": refused,
        "environment_s": _mean(steps, "timing/rollout_environment_mean_s") / turns,
        "refit_s": _mean(steps, "timing/refit"),
        "overhead_s": sum(_mean(steps, f"timing/{n}") for n in ("build_batch", "advantages", "record")),
    }
    if training > 0:
        measured["trainer_tokens_per_s"] = tokens / training / workers
    if sampling > 0:
        engines = _mean(steps, "generation/engines") or 1.0  # only engines in processes of their own count themselves
        measured["engine_tokens_per_s"] = response * rollouts / sampling / engines
    spread = _spread(run_dir)
    if spread is not None:
        measured["response_spread"] = spread
    return measured


def _refused(metrics: dict[str, float]) -> float:
    """Share of the groups of a step that the batch left out."""
    groups, refused = metrics.get("rollouts/num_groups", 0.0), metrics.get("rollouts/discarded_groups", 0.0)
    return refused / groups if refused < groups else 0.0


def _sampling_s(metrics: dict[str, float]) -> float:
    """Seconds of a step in which the engine had requests."""
    idle_s, share = metrics.get("async/engine_idle_s", 0.0), metrics.get("async/engine_idle_fraction", 0.0)
    return idle_s / share - idle_s if share > 0 else metrics["timing/step"]


def _spread(run_dir: Path) -> float | None:
    """Standard deviation over mean of the recorded responses; None if none were recorded."""
    files = sorted((run_dir / "rollouts").glob("step_*.jsonl"), key=lambda path: path.stat().st_mtime)[-2:]
    lengths = [r.num_sampled_tokens for path in files for group in read_groups(path) for r in group.valid]
    mean = sum(lengths) / len(lengths) if lengths else 0.0
    return statistics.pstdev(lengths) / mean if mean else None


def _mean(steps: Sequence[dict[str, float]], name: str) -> float:
    return statistics.fmean(m.get(name, 0.0) for m in steps)


def _config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
