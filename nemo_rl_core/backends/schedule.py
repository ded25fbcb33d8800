"""The learning rate over optimizer steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from nemo_rl_core.errors import ConfigError

if TYPE_CHECKING:
    from nemo_rl_core.schema import SchedulerConfig

__all__ = ["check_schedule", "learning_rate_factor", "make_scheduler"]


def learning_rate_factor(config: SchedulerConfig, step: int) -> float:
    """Share of the peak learning rate at optimizer step `step` (0 is the first)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.name == "constant" or config.total_steps is None:
        return 1.0
    span = max(1, config.total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    remaining = 1 - progress if config.name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining


def check_schedule(config: SchedulerConfig) -> None:
    """Refuse a decay without an end.

    Raises:
        ConfigError: Says what is to be set.
    """
    if config.name != "constant" and config.total_steps is None:
        raise ConfigError(
            f"policy.scheduler.name is {config.name!r}, but neither policy.scheduler.total_steps nor max_steps says "
            "where the decay ends. Set one of them."
        )


def make_scheduler(config: SchedulerConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Build the schedule.

    Raises:
        ConfigError: A decay without an end.
    """
    check_schedule(config)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(config, step))
