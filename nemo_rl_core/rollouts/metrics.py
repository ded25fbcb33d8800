"""Metrics of a step's rollouts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from nemo_rl_core.records.rollout import Rollout, RolloutGroup

__all__ = ["failure_summary", "rollout_metrics"]


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Metrics of these groups, over the rollouts that did not fail unless their name says otherwise.

    Returns:
        `reward/mean, std, min, max` and `reward/<name>/mean` for each named reward;
        `rollouts/response_tokens_mean, _min, _max`, `rollouts/turns_mean`, `rollouts/truncated_fraction`,
        `rollouts/terminated_fraction`, `rollouts/empty_fraction` (nothing but an end token, or no text);
        `rollouts/zero_variance_fraction` of groups, of which `rollouts/all_max_fraction` have every rollout at
        the best and `rollouts/all_min_fraction` at the worst reward of the step (of a constant step: by
        its sign); `rollouts/num, num_groups, failed_fraction` and `rollouts/failed_<stage>` (counts over
        all rollouts); `rollouts/forks` (sequences begun because a template rewrote history);
        `env/<key>` means of numeric infos; `timing/rollout_<stage>_mean_s` and `_max_s`.
        Standard deviations divide by n.
    """
    rollouts = [r for g in groups for r in g.rollouts]
    valid = [r for r in rollouts if not r.failed]
    return {
        **_counts(groups, rollouts),
        **_rewards(valid),
        **_lengths(valid),
        **_variance(groups),
        **_infos(valid),
        **_timing(rollouts),
    }


def failure_summary(groups: Sequence[RolloutGroup], *, limit: int = 5) -> str:
    """The most frequent errors of these groups with their counts, one a line; empty if none failed."""
    errors = [r.error for g in groups for r in g.rollouts if r.error is not None]
    common = Counter((e.stage, e.type, e.message) for e in errors).most_common(limit)
    return "\n".join(f"{count} x {stage}: {type_}: {message}" for (stage, type_, message), count in common)


def _counts(groups: Sequence[RolloutGroup], rollouts: Sequence[Rollout]) -> dict[str, float]:
    stages = Counter(r.error.stage for r in rollouts if r.error is not None)
    return {
        "rollouts/num": float(len(rollouts)),
        "rollouts/num_groups": float(len(groups)),
        "rollouts/failed_fraction": _share(sum(stages.values()), len(rollouts)),
        **{f"rollouts/failed_{stage}": float(count) for stage, count in sorted(stages.items())},
    }


def _rewards(valid: Sequence[Rollout]) -> dict[str, float]:
    if not valid:
        return {}
    totals = [r.reward for r in valid]
    mean = _mean(totals)
    by_name: dict[str, list[float]] = defaultdict(list)
    for rollout in valid:
        for name, value in rollout.rewards.items():
            by_name[name].append(value)
    return {
        "reward/mean": mean,
        "reward/std": math.sqrt(_mean((x - mean) ** 2 for x in totals)),
        "reward/min": min(totals),
        "reward/max": max(totals),
        **{f"reward/{name}/mean": _mean(values) for name, values in sorted(by_name.items())},
    }


def _lengths(valid: Sequence[Rollout]) -> dict[str, float]:
    if not valid:
        return {}
    tokens = [r.num_sampled_tokens for r in valid]
    turns = [sum(t.sampled for segment in r.segments for t in segment) for r in valid]
    return {
        "rollouts/response_tokens_mean": _mean(tokens),
        "rollouts/response_tokens_min": float(min(tokens)),
        "rollouts/response_tokens_max": float(max(tokens)),
        "rollouts/turns_mean": _mean(turns),
        "rollouts/truncated_fraction": _mean(r.truncated for r in valid),
        "rollouts/terminated_fraction": _mean(r.terminated for r in valid),
        "rollouts/empty_fraction": _mean(not r.response.strip() for r in valid),
        "rollouts/forks": float(sum(max(len(r.segments) - 1, 0) for r in valid)),
    }


def _variance(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    scored = [rewards for g in groups if (rewards := g.rewards)]
    if not scored:
        return {}
    best = max(max(rewards) for rewards in scored)
    worst = min(min(rewards) for rewards in scored)
    flat = [rewards[0] for rewards in scored if max(rewards) == min(rewards)]
    at_best = sum(x == best and (best > worst or best > 0) for x in flat)
    at_worst = sum(x == worst and (best > worst or best <= 0) for x in flat)
    return {
        "rollouts/zero_variance_fraction": _share(len(flat), len(scored)),
        "rollouts/all_max_fraction": _share(at_best, len(scored)),
        "rollouts/all_min_fraction": _share(at_worst, len(scored)),
    }


def _infos(valid: Sequence[Rollout]) -> dict[str, float]:
    values_of: dict[str, list[float]] = defaultdict(list)
    for rollout in valid:
        for key, value in rollout.info.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                values_of[f"env/{key}"].append(float(value))
    return {name: _mean(values) for name, values in sorted(values_of.items())}


def _timing(rollouts: Sequence[Rollout]) -> dict[str, float]:
    durations_of: dict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        for stage, seconds in rollout.timing_s.items():
            durations_of[stage].append(seconds)
    metrics: dict[str, float] = {}
    for stage, durations in sorted(durations_of.items()):
        metrics[f"timing/rollout_{stage}_mean_s"] = _mean(durations)
        metrics[f"timing/rollout_{stage}_max_s"] = max(durations)
    return metrics


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
