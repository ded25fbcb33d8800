"""Settings of the rollouts."""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen

from nemo_rl_core.schema.validators import ge, gt, le

__all__ = ["RolloutConfig"]


@frozen(kw_only=True)
class RolloutConfig:
    """Limits, deadlines and order of episodes."""

    max_turns: int = field(default=1, validator=ge(1))
    """Maximum turns of the policy in one episode."""
    max_in_flight: int = field(default=1024, validator=ge(1))
    """Maximum episodes that run at the same time."""
    staleness: int = field(default=0, validator=ge(0))
    """Maximum steps by which the sampling weights may lag behind the trained ones. 0 is synchronous on-policy
    training."""
    order: Literal["data", "ready_first"] = "data"
    """Order of training with staleness above 0. data trains on groups in the order of their prompts. ready_first trains
    on finished groups, oldest first, so that a slow group delays only the last step that may use it."""
    too_old: Literal["wait", "resample", "drop"] = "wait"
    """Treatment of a group that the next step could no longer use, with ready_first. wait waits for it now; resample
    goes on and samples its prompt again with newer weights; drop goes on without it."""
    weight_updates: Literal["in_flight", "between"] | None = None
    """Way in which a sampling engine gets new weights. in_flight swaps them while requests continue; between first
    finishes the engine's requests and holds back new ones. None means in_flight if the engine supports it."""
    generation_timeout_s: float = field(default=600.0, validator=gt(0))
    """Seconds that one completion may take."""
    environment_timeout_s: float = field(default=120.0, validator=gt(0))
    """Seconds that one reset or step of an environment may take."""
    reward_timeout_s: float = field(default=30.0, validator=gt(0))
    """Seconds that one call in the process pool may take before its process is killed."""
    num_reward_workers: int = field(default=1, validator=ge(1))
    """Number of processes that run reward functions and CPU-bound scoring."""
    max_failed_fraction: float = field(default=0.5, validator=[ge(0), le(1)])
    """Fraction of a step's rollouts that may fail. If more do, the run stops and names the errors."""
    record: bool = True
    """Whether to write every rollout to `rollouts/step_<n>.jsonl` in the run folder."""
