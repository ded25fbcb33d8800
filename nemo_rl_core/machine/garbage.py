"""Garbage collection while many small objects live for long.

Python's collector walks every live object each time the young ones pile up. With ten thousand episodes in
flight, beside the millions of objects of the imported libraries, that costs more than the episodes.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["relaxed_collection"]

_THRESHOLDS = (50_000, 20, 50)
_lock = threading.Lock()
_depth = 0
_saved = (700, 10, 10)
_frozen = False


@contextmanager
def relaxed_collection() -> Iterator[None]:
    """Leave what is alive now out of collections, and collect the rest less often, until the end.

    May be nested and used from several threads; the last one out restores the collector. A program that
    has switched the collector off, or set a higher threshold, keeps its own setting.
    """
    global _depth, _saved, _frozen
    with _lock:
        if _depth == 0:
            _saved = gc.get_threshold()
            _frozen = gc.get_freeze_count() == 0  # else the program has frozen what it wants to
            if _frozen:
                gc.freeze()
            if gc.isenabled() and 0 < _saved[0] < _THRESHOLDS[0]:
                gc.set_threshold(*_THRESHOLDS)
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                gc.set_threshold(*_saved)
                if _frozen:
                    gc.unfreeze()
