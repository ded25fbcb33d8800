"""What an agent is given, and how it may fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

from nemo_rl_core.errors import EnvironmentFailure

__all__ = ["AgentCall", "AgentFailed"]


class AgentFailed(EnvironmentFailure):
    """The agent raised, ended with an error, or passed its deadline; the message names it."""


@frozen(kw_only=True)
class AgentCall:
    """One run of an agent."""

    task: Mapping[str, Any]
    """The row."""
    base_url: str
    """Of the policy, for this run alone; it ends in `/v1`."""
    api_key: str = field(repr=False)
    """Names this run as well, for an agent whose base URL is fixed."""
    model: str
    """Any name is served."""
    seed: int
    """Equal for the rollouts of a group: for what should be equal in all of them, such as a simulated user."""
