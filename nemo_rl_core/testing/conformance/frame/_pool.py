"""The process pool in which kits score."""

from __future__ import annotations

import functools

from nemo_rl_core.rollouts.scoring.process_pool import ProcessPool

__all__ = ["shared_pool"]


@functools.cache
def shared_pool() -> ProcessPool:
    """A pool of two workers, kept for this process: what they have imported serves the next kit, too."""
    return ProcessPool(2, default_timeout_s=60.0)
