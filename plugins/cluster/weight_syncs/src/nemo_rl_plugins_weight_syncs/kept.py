"""What a process keeps between two refits: mapped buffers, process groups, bases of deltas.

It belongs to a session (one weight sync) and an epoch of it. A refit that fails ends the epoch: nothing that it may
have left half done is used again, on either side.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

__all__ = ["forget", "keep", "start_epoch"]

Key = tuple[str, str, int]
"""What it is, session, epoch."""

_kept: dict[Key, Any] = {}
_lock = threading.Lock()


def keep(key: Key, make: Callable[[], Any]) -> Any:
    """What is kept under `key`; made if there is nothing yet."""
    with _lock:
        found = _kept.get(key)
    if found is None:
        found = make()
        with _lock:
            _kept[key] = found
    return found


def forget(key: Key) -> None:
    """Close and drop what is kept under `key`, if anything is."""
    with _lock:
        found = _kept.pop(key, None)
    close = getattr(found, "close", None)
    if close is not None:
        close()


def start_epoch(session: str, epoch: int) -> None:
    """Forget what other epochs of the session have left."""
    with _lock:
        old = [key for key in _kept if key[1] == session and key[2] != epoch]
    for key in old:
        forget(key)
