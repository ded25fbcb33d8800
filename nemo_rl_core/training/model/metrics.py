"""Reducing metrics over micro-batches, ranks and optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from nemo_rl_core.protocols.loss import Metric

__all__ = ["merge_metrics", "metric_values"]


def merge_metrics(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Join partial metrics of the same names; a mean is sum of totals over sum of counts."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = _join(merged[name], metric) if name in merged else _plain(metric)
    return merged


def metric_values(metrics: Mapping[str, Metric], *, prefix: str = "") -> dict[str, float]:
    """Final floats; a mean, a minimum or a maximum over nothing (inf and -inf) is left out."""
    values: dict[str, float] = {}
    for name, metric in metrics.items():
        total, count = float(metric.total), float(metric.count)
        if metric.reduction == "mean":
            if count:
                values[prefix + name] = total / count
        elif (metric.reduction, total) not in (("min", math.inf), ("max", -math.inf)):
            values[prefix + name] = total
    return values


def _plain(metric: Metric) -> Metric:
    return Metric(float(metric.total), float(metric.count), metric.reduction)


def _join(left: Metric, right: Metric) -> Metric:
    if left.reduction != right.reduction:
        raise ValueError(f"A metric is reduced both by {left.reduction!r} and by {right.reduction!r}.")
    a, b = float(left.total), float(right.total)
    if left.reduction == "min":
        return Metric(min(a, b), 1.0, "min")
    if left.reduction == "max":
        return Metric(max(a, b), 1.0, "max")
    return Metric(a + b, float(left.count) + float(right.count), left.reduction)
