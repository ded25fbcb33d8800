"""How many devices of each machine a role takes. Plain arithmetic; nothing here asks Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["fill", "plan"]


def fill(num_blocks: int, size: int, free: Sequence[int]) -> dict[int, int] | None:
    """Put blocks, each of which must stand on one machine, on as few machines as they fill.

    What fits on one machine goes to the one that it fills best; what does not takes whole machines first.

    Args:
        num_blocks: How many.
        size: Devices of one block.
        free: Devices of each machine.

    Returns:
        Blocks by machine (its place in `free`), in the order in which they are to be filled; None if they do not fit.
    """
    room = {machine: devices // size for machine, devices in enumerate(free) if devices >= size}
    if sum(room.values()) < num_blocks:
        return None
    taken: dict[int, int] = {}
    left = num_blocks
    while left:
        enough = [machine for machine, blocks in room.items() if blocks >= left]
        # of equally good ones the first: min and max keep the order
        machine = min(enough, key=lambda m: free[m]) if enough else max(room, key=lambda m: room[m])
        taken[machine] = min(left, room.pop(machine))
        left -= taken[machine]
    return taken


def plan(roles: Iterable[int], free: Sequence[int]) -> list[int] | None:
    """Devices to hold of each machine so that every role of these sizes has room, the largest first.

    Returns:
        Devices by machine, those in use only and the most first; None if the roles do not fit.
    """
    left = list(free)
    for wanted in sorted(roles, reverse=True):
        taken = fill(wanted, 1, left)
        if taken is None:
            return None
        for machine, devices in taken.items():
            left[machine] -= devices
    used = (before - after for before, after in zip(free, left, strict=True))
    return sorted((devices for devices in used if devices), reverse=True)
