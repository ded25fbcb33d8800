"""What a process keeps between two refits: mapped buffers, process groups, bases of deltas."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

__all__ = ["forget", "keep"]

_kept: dict[tuple[Any, ...], Any] = {}
_lock = threading.Lock()


def keep(key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What is kept under `key`; made if there is nothing yet."""
    with _lock:
        found = _kept.get(key)
    if found is None:
        found = make()
        with _lock:
            _kept[key] = found
    return found


def forget(key: tuple[Any, ...]) -> None:
    """Close and drop what is kept under `key`, if anything is."""
    with _lock:
        found = _kept.pop(key, None)
    close = getattr(found, "close", None)
    if close is not None:
        close()
