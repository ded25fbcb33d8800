"""Measurement of how long a coroutine blocks its event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any

__all__ = ["longest_block"]

_EVERY_S = 0.01


async def longest_block(work: Coroutine[Any, Any, Any]) -> float:
    """Run `work` and return by how many seconds, at most, a task beside it that sleeps for 10 ms woke late."""
    worst = 0.0

    async def tick() -> None:
        nonlocal worst
        while True:
            before = time.monotonic()
            await asyncio.sleep(_EVERY_S)
            worst = max(worst, time.monotonic() - before - _EVERY_S)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0)
    try:
        await work
        await asyncio.sleep(0)  # a block just before the end is seen by the next tick
        await asyncio.sleep(2 * _EVERY_S)
    finally:
        ticking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticking
    return worst
