"""The process of `_probing`: imports what distributions provide, one after the other."""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any, TextIO

import attrs

from nemo_rl_core.registry._registry import Registry
from nemo_rl_core.registry.discovery._importing import side_effects
from nemo_rl_core.registry.explaining._finding import Finding
from nemo_rl_core.registry.explaining._loading import faults_of_components, faults_of_hooks

__all__ = ["main"]


def main() -> None:
    """Import each distribution of the order in `sys.argv`; write `{"begin": name}` and `{"end": name, ...}` lines.

    The process ends early after one that changed it: what is imported after it would suffer from that.
    """
    order: dict[str, Any] = json.loads(sys.argv[1])
    sys.path[:] = order["path"]
    folder = Path(order["folder"])
    with open(folder / "lines", "a", encoding="utf-8") as lines, open(folder / "stack", "w") as stack:
        for name in order["distributions"]:
            if not _imported(name, lines, stack, order["timeout_s"]):
                return


def _imported(name: str, lines: TextIO, stack: TextIO, timeout_s: float) -> bool:
    """Whether the process is as it was."""
    _write(lines, {"begin": name})
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=stack)
    registry = Registry(allow=[name])
    found = [
        *faults_of_components(registry, load=True, distribution=name),
        *faults_of_hooks(registry, distribution=name),
    ]
    effects = side_effects()
    found += [_side_effect(name, effect) for effect in effects]
    faulthandler.cancel_dump_traceback_later()
    _write(lines, {"end": name, "findings": [attrs.asdict(finding) for finding in found]})
    return not effects


def _side_effect(name: str, effect: str) -> Finding:
    return Finding(
        "side effect",
        name,
        f"after its import {effect}",
        "its author should do that when a run begins",
        severity="note",
    )


def _write(lines: TextIO, line: dict[str, Any]) -> None:
    lines.write(json.dumps(line) + "\n")
    lines.flush()
