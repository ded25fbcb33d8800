"""One thing that is wrong with what is installed."""

from __future__ import annotations

from typing import Literal

from attrs import frozen

from nemo_rl_core.registry.discovery._index import CORE, DENY_VARIABLE

__all__ = ["Finding", "Problem", "remedy"]

Problem = Literal[
    "broken",
    "conflict",
    "incompatible",
    "misplaced",
    "missing requirement",
    "missing extra",
    "hook plugin",
    "side effect",
    "node",
]


@frozen
class Finding:
    """One thing that is wrong, or worth knowing."""

    problem: Problem
    subject: str
    """The distribution or component in question."""
    message: str
    fix: str
    severity: Literal["error", "note"] = "error"
    """A note is no fault: something optional is not installed."""


def remedy(distribution: str | None) -> str:
    """What to do about a component that cannot be loaded. The core cannot be disabled, and user code not installed."""
    if distribution is None:
        return "correct that code"
    if distribution == CORE:
        return f"pip install --force-reinstall {CORE}"
    return f"repair it (pip install -U {distribution}), or disable it: {DENY_VARIABLE}={distribution}"
