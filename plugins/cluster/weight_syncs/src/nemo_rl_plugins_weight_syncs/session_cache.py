"""Cache of a process between two refits: mapped buffers, process groups, bases of deltas.

An entry belongs to a session (one weight sync) and an epoch of it. A failed refit ends the epoch, so that neither side
uses anything again that it may have left half done.
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
    """Return the entry of `key`; make it if there is none yet."""
    with _lock:
        value = _kept.get(key)
    if value is None:
        value = make()
        with _lock:
            _kept[key] = value
    return value


def forget(key: Key) -> None:
    """Close and drop the entry of `key`, if there is one."""
    with _lock:
        value = _kept.pop(key, None)
    close = getattr(value, "close", None)
    if close is not None:
        close()


def start_epoch(session: str, epoch: int) -> None:
    """Forget what other epochs of the session have left."""
    with _lock:
        old = [key for key in _kept if key[1] == session and key[2] != epoch]
    for key in old:
        forget(key)
