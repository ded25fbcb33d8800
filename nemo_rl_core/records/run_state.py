"""State of a run while it runs, and its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from nemo_rl_core.schema import RunConfig

__all__ = ["RunResult", "RunState", "Sample"]


@frozen(kw_only=True)
class Sample:
    """One generation kept for people to read."""

    prompt: str
    response: str
    reward: float
    step: int


@define(kw_only=True)
class RunState:
    """Passed to every lifecycle hook. Hooks may set the two `*_requested` fields; the rest is read-only."""

    config: RunConfig
    run_dir: Path
    algorithm: str
    max_steps: int | None = None
    """Last step of the run, if known beforehand."""
    step: int = 0
    """Steps completed."""
    weight_version: int = 0
    """Optimizer updates behind the weights, counted in steps."""
    stop_requested: bool = False
    """Set by a hook to end the run after this step."""
    checkpoint_requested: bool = False
    """Set by a hook to save a checkpoint after this step."""
    history: list[dict[str, float]] = field(factory=list)
    """Metrics of each completed step, `step` included."""
    samples: list[Sample] = field(factory=list)
    """A few generations of the last step or validation."""
    manifest: list[dict[str, Any]] = field(factory=list)
    """The components this run is made of."""


@frozen(kw_only=True)
class RunResult:
    """Result of `fit`."""

    status: str
    """"completed" or "interrupted"."""
    step: int
    metrics: dict[str, float]
    """Metrics of the last step."""
    history: list[dict[str, float]]
    run_dir: Path
    model_path: Path | None
    """Folder of the final Hugging Face checkpoint, if one was exported."""
    checkpoint: Path | None
    """Newest checkpoint of the run."""
    samples: list[Sample] = field(factory=list)
