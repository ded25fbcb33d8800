"""What the quickstart found."""

from __future__ import annotations

from pathlib import Path

from attrs import frozen

from nemo_rl_core.records.run_state import RunResult, Sample

__all__ = ["QuickstartResult"]


@frozen(kw_only=True)
class QuickstartResult:
    """What the quickstart shows."""

    seed: int
    generation_backend: str
    sft: RunResult
    grpo: RunResult
    accuracy_before: float
    """Share of held-out tasks solved after the warm start, sampled as in training; no partial credit."""
    accuracy_after: float
    greedy_before: float
    greedy_after: float
    samples_before: list[Sample]
    samples_after: list[Sample]
    seconds: float
    report: Path
