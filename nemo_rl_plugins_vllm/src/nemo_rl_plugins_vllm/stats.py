"""Statistics of vLLM's steps, added up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

__all__ = ["Counters", "StepCounter"]


class Counters:
    """Sums since the last `take`; used in the engine's thread, taken from another."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}

    def add(self, **values: float) -> None:
        """Add to sums by name."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def largest(self, **values: float) -> None:
        """Keep the largest value by name."""
        for name, value in values.items():
            self._sums[name] = max(self._sums.get(name, value), value)

    def take(self) -> Mapping[str, float]:
        """All of them, which start anew; means over the steps in place of their sums."""
        sums, self._sums = self._sums, {}
        steps = sums.get("steps", 0.0)
        for name in ("running", "waiting"):
            total = sums.pop(f"{name}_sum", 0.0)
            if steps:
                sums[name] = total / steps
        return sums


class StepCounter(StatLoggerBase):
    """Called by vLLM after each step of an engine."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: object = None, engine_idx: int = 0
    ) -> None:
        """Add a step."""
        if scheduler_stats is not None:
            cache = scheduler_stats.prefix_cache_stats
            self._counters.add(
                steps=1,
                running_sum=scheduler_stats.num_running_reqs,
                waiting_sum=scheduler_stats.num_waiting_reqs,
                prefix_queried_tokens=cache.queries,
                prefix_cached_tokens=cache.hits,
            )
            self._counters.largest(kv_cache_usage=scheduler_stats.kv_cache_usage)
        if iteration_stats is not None:
            self._counters.add(preempted=iteration_stats.num_preempted_reqs)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
