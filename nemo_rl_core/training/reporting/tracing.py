"""The trace of a run: which plugin's code ran when, in `debug.jsonl` of the run folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_rl_core.registry import Trace
from nemo_rl_core.registry.discovery._index import DEBUG_VARIABLE

__all__ = ["traced"]


@contextmanager
def traced(run_dir: Path, debug: bool | None) -> Iterator[None]:
    """Trace what runs inside, worker processes included, if it is asked for.

    Args:
        run_dir: Gets `debug.jsonl`; one that is there is added to.
        debug: None is what NEMO_RL_DEBUG says.
    """
    before = os.environ.get(DEBUG_VARIABLE)
    if not (bool(before) if debug is None else debug):
        yield
        return
    os.environ[DEBUG_VARIABLE] = "1"  # worker processes inherit it
    try:
        with Trace(run_dir / "debug.jsonl"):
            yield
    finally:
        if before is None:
            del os.environ[DEBUG_VARIABLE]
