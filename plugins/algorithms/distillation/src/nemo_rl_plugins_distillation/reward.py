"""A reward for runs that need none."""

from __future__ import annotations

__all__ = ["unscored"]


def unscored(response: str) -> float:
    """0 for every response: the teacher is all there is to learn from."""
    return 0.0
