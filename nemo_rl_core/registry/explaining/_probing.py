"""Importing plugins in a process that may die of it: one row tells what happened to each distribution.

One child imports distributions one after the other and writes a line before and after each. If it dies, hangs or is
changed for those that follow, a fresh one goes on with the next distribution; so an installation without faults
costs one process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_rl_core.registry.discovery._distributions import Distribution
from nemo_rl_core.registry.discovery._index import DENY_VARIABLE
from nemo_rl_core.registry.explaining._finding import Finding, remedy

__all__ = ["probe"]

_GRACE_S = 30.0
"""For a child to start and end, beside what the imports may take."""
_CHILD = "from nemo_rl_core.registry.explaining._probe_child import main; main()"


def probe(distributions: Sequence[Distribution], *, timeout_s: float) -> Iterator[Finding]:
    """Import all that the distributions provide, elsewhere.

    Args:
        distributions: In this order.
        timeout_s: How long the imports of one may take.
    """
    left = list(distributions)
    while left:
        lines, stood = _child([dist.name for dist in left], timeout_s)
        done = [line for line in lines if "end" in line]
        for line in done:
            yield from (Finding(**row) for row in line["findings"])
        if len(done) < len(left) and (len(lines) > 2 * len(done) or not done):
            dist = left[len(done)]
            told = f"its import {stood}"
            yield Finding("broken", f"{dist.name} {dist.version}", told, remedy(dist.name))
            left = left[len(done) + 1 :]
        else:
            left = left[len(done) :]


def _child(names: Sequence[str], timeout_s: float) -> tuple[list[dict[str, Any]], str]:
    """What one child wrote, and how it ended."""
    with tempfile.TemporaryDirectory(prefix="nemo-rl-doctor-") as name:
        folder = Path(name)
        order = {"distributions": list(names), "path": sys.path, "folder": name, "timeout_s": timeout_s}
        with open(folder / "output", "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, json.dumps(order)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), DENY_VARIABLE: ""},
                start_new_session=True,
            )
            try:
                code = process.wait(timeout_s * len(names) + _GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
        lines = _lines(folder / "lines")
        stack = _text(folder / "stack")
        if "Timeout (" in stack:
            place = next((line.strip() for line in stack.splitlines() if line.strip().startswith("File ")), "")
            return lines, f"did not end within {timeout_s:g} s; it stood at {place}"
        if code < 0:
            return lines, f"was ended by {signal.Signals(-code).name}"
        tail = _text(folder / "output").strip().splitlines()[-1:]
        return lines, f"ended its process with status {code}" + "".join(f"; it last said: {line}" for line in tail)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text(path).splitlines() if line.endswith("}")]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
