"""Checks of rewards by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nemo_rl_core.errors import (
    RewardError,
)

__all__ = ["finite_rewards"]


def finite_rewards(rewards: Mapping[str, Any]) -> dict[str, float]:
    """The rewards as finite floats.

    Raises:
        RewardError: One is not a number, or not finite; a failed reward must not pass for 0.
    """
    if not isinstance(rewards, Mapping):
        raise RewardError(f"The rewards are {rewards!r:.80}; they must be a mapping, such as {{'reward': 1.0}}.")
    checked: dict[str, float] = {}
    for name, value in rewards.items():
        if isinstance(value, str) or not hasattr(value, "__float__"):
            raise RewardError(f"Reward {name!r} is {value!r} ({type(value).__name__}); it must be a number.")
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise RewardError(f"Reward {name!r} is {value!r}, which is not one number: {error}.") from error
        if not math.isfinite(number):
            raise RewardError(f"Reward {name!r} is {number}; it must be finite. Check for a division by zero.")
        checked[str(name)] = number
    return checked
