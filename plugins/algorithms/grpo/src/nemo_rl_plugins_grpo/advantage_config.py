"""Options of the advantage estimators."""

from __future__ import annotations

from attrs import Factory, field, frozen

from nemo_rl_core.schema.validators import ge, gt

__all__ = [
    "GDPOAdvantagesConfig",
    "GroupRelativeConfig",
    "PassAtKConfig",
    "RLOOAdvantagesConfig",
    "RawConfig",
    "ReinforcePPAdvantagesConfig",
]


@frozen(kw_only=True)
class GroupRelativeConfig:
    """Options of the advantages `grpo`."""

    normalize: bool = True
    """Divide by the group's standard deviation; False is Dr. GRPO's."""
    leave_one_out: bool = True
    """Baseline and deviation of a rollout come from the others of its group; False: from all of it."""
    epsilon: float = field(default=1e-6, validator=gt(0))
    """Added to the standard deviation."""


@frozen(kw_only=True)
class RLOOAdvantagesConfig:
    """Options of the advantages `rloo`."""

    whiten: bool = False
    """Bring the advantages of the batch to mean 0 and standard deviation 1, each rollout counting once."""
    epsilon: float = field(default=1e-4, validator=gt(0))
    """Added to the standard deviation."""


@frozen(kw_only=True)
class ReinforcePPAdvantagesConfig:
    """Options of the advantages `reinforce_pp`."""

    group_baseline: bool = False
    """Take the mean of the group from the reward first (REINFORCE++-baseline); False needs no groups."""
    whiten: bool = True
    """Bring the advantages of all trained tokens of the batch to mean 0 and standard deviation 1."""
    epsilon: float = field(default=1e-8, validator=gt(0))
    """Added to the standard deviation."""


@frozen(kw_only=True)
class GDPOAdvantagesConfig:
    """Options of the advantages `gdpo`."""

    weights: dict[str, float] = Factory(dict)
    """Weight of each reward by name; those without are left out. Empty takes every reward with weight 1."""
    leave_one_out: bool = False
    """Baseline and deviation of a rollout come from the others of its group; False: from all of it."""
    whiten: bool = True
    """Bring the sum, over the batch, to mean 0 and standard deviation 1, each rollout counting once."""
    epsilon: float = field(default=1e-6, validator=gt(0))
    """Added to the standard deviations."""


@frozen(kw_only=True)
class RawConfig:
    """Options of the advantages `raw`."""

    whiten: bool = False
    """Bring the advantages of all trained tokens of the batch to mean 0 and standard deviation 1."""
    epsilon: float = field(default=1e-8, validator=gt(0))
    """Added to the standard deviation."""


@frozen(kw_only=True)
class PassAtKConfig:
    """Options of the advantages `pass_at_k`."""

    k: int = field(default=4, validator=ge(1))
    """Rollouts of which the best counts; 1 is RLOO. A group of n has subsets of at most n - 1."""
