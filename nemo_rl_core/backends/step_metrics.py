"""Metrics of the micro-batches of one step, added up on the device and read once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_rl_core.protocols.loss import Metric

__all__ = ["StepMetrics"]


class StepMetrics:
    """Adds up `Metric`s without waiting for the device."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[str, list[Any], list[Any]]] = {}

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Take in the metrics of one micro-batch."""
        for name, metric in metrics.items():
            _, totals, counts = self._parts.setdefault(name, (metric.reduction, [], []))
            totals.append(metric.total.detach() if isinstance(metric.total, Tensor) else metric.total)
            counts.append(metric.count.detach() if isinstance(metric.count, Tensor) else metric.count)

    def reduce(self) -> dict[str, Metric]:
        """One `Metric` of plain floats per name."""
        values = _to_floats([x for _, totals, counts in self._parts.values() for x in (*totals, *counts)])
        result: dict[str, Metric] = {}
        start = 0
        for name, (reduction, parts, _) in self._parts.items():
            middle, end = start + len(parts), start + 2 * len(parts)
            totals, counts = values[start:middle], values[middle:end]
            combine = {"min": min, "max": max}.get(reduction, sum)
            result[name] = Metric(float(combine(totals)), float(sum(counts)), reduction)  # type: ignore[arg-type]
            start = end
        return result


def _to_floats(values: list[Any]) -> list[float]:
    """Numbers and one-element tensors to floats, with one transfer for all tensors."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    moved = iter(torch.stack([t.double().reshape(()) for t in tensors]).tolist() if tensors else [])
    return [next(moved) if isinstance(v, Tensor) else float(v) for v in values]
