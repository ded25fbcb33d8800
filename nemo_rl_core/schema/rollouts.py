"""Settings of the rollouts."""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen

from nemo_rl_core.schema.validators import ge, gt, le

__all__ = ["RolloutConfig"]


@frozen(kw_only=True)
class RolloutConfig:
    """How episodes are run."""

    max_turns: int = field(default=1, validator=ge(1))
    """Turns of the policy in one episode at most."""
    max_in_flight: int = field(default=1024, validator=ge(1))
    """Episodes admitted at a time."""
    staleness: int = field(default=0, validator=ge(0))
    """Steps of the run by which the weights that sampled may lie behind; 0 is synchronous on-policy training."""
    order: Literal["data", "ready_first"] = "data"
    """With staleness above 0: data trains on groups in the order of their prompts; ready_first on those that are done,
    the oldest first, so that a slow one holds up no step before its last."""
    too_old: Literal["wait", "resample", "drop"] = "wait"
    """With ready_first, what becomes of a group that the next step would find beyond the bound: wait for it now; or go
    on without it, and sample its prompt again with newer weights, or leave it out."""
    weight_updates: Literal["in_flight", "between"] | None = None
    """How new weights reach an engine that is sampling: in_flight swaps them under the requests, which go on; between
    lets the engine finish its requests first, and holds new ones back. None is in_flight where the engine can."""
    generation_timeout_s: float = field(default=600.0, validator=gt(0))
    """Deadline of one completion."""
    environment_timeout_s: float = field(default=120.0, validator=gt(0))
    """Deadline of one reset or step."""
    reward_timeout_s: float = field(default=30.0, validator=gt(0))
    """Deadline of one call in the process pool; the process is killed at it."""
    num_reward_workers: int = field(default=1, validator=ge(1))
    """Processes that run reward functions and CPU-bound scoring."""
    max_failed_fraction: float = field(default=0.5, validator=[ge(0), le(1)])
    """The run stops, naming the errors, when more of a step's rollouts than this fail."""
    record: bool = True
    """Write every rollout to `rollouts/step_<n>.jsonl` in the run folder."""
