"""Counter-based random numbers: a uniform is a function of (seed, position) and of nothing else.

So a request draws the same numbers whatever else is in the batch, in whatever row, after whatever pause.
Source: SplitMix64 (Steele, Lea, Flood 2014), used as a hash of the counter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["uniforms"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: Sequence[int], first: Sequence[int], count: int) -> npt.NDArray[np.float32]:
    """Uniform numbers in [0, 1), each on a grid of 2^-23.

    Args:
        seeds: [B] any integers, taken modulo 2^64.
        first: [B] position of each row's first number.
        count: Numbers per row.

    Returns:
        [B, count] float32; element (b, i) depends on seeds[b] and first[b] + i only.
    """
    with np.errstate(over="ignore"):
        keys = _mix(np.array([s & _MASK for s in seeds], dtype=np.uint64) + _GOLDEN)
        start = np.array(first, dtype=np.uint64)
        positions = start[:, None] + np.arange(1, count + 1, dtype=np.uint64)
        counters = (keys[:, None] + positions * _GOLDEN).astype(np.uint64)
        bits = _mix(_mix(counters) ^ keys[:, None])
    # 23 bits: the largest value times a float32 total stays below the total.
    return (bits >> np.uint64(41)).astype(np.float32) * np.float32(2.0**-23)
