"""Metrics of several engines, combined as those of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["merge_engine_metrics"]

_AVERAGED = ("_fill", "_rate", "_share", "_fraction", "_ratio", "_usage", "_utilization")
"""Names that end so are shares of something, not counts."""


def merge_engine_metrics(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Counts summed over the engines, shares (by their name) averaged over those that report them."""
    names = dict.fromkeys(name for found in metrics for name in found)
    merged = {}
    for name in names:
        values = [float(found[name]) for found in metrics if name in found]
        merged[name] = sum(values) / len(values) if name.endswith(_AVERAGED) else sum(values)
    return merged
