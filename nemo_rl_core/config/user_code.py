"""Advice for a name that only a script or notebook registers, used where that code has not run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from nemo_rl_core.errors import PluginError
from nemo_rl_core.schema.mistakes import Mistake

__all__ = ["explain_user_code"]


def explain_user_code(mistakes: Sequence[Mistake], tree: Mapping[str, Any]) -> list[Mistake]:
    """Say of each component that is missing whether the run in this run folder had it from user code.

    Args:
        mistakes: Of which some tell of a component that cannot be found.
        tree: The configuration as written; it names the run folder.

    Returns:
        The mistakes; those that a manifest explains say what is missing, where it was defined, what to do.
    """
    if not any(isinstance(m.error, PluginError) for m in mistakes):
        return list(mistakes)
    run_dir = Path(str(tree.get("run_dir") or f"runs/{tree.get('name') or tree.get('algorithm')}")).expanduser()
    rows = _user_code(run_dir / "manifest.json")
    return [_explained(m, tree, rows, run_dir) for m in mistakes]


def _user_code(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [row for row in rows if row.get("distribution") is None]
    except (OSError, ValueError, AttributeError):
        return []


def _explained(m: Mistake, tree: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], run_dir: Path) -> Mistake:
    name = _at(tree, m.keys)
    row = next((r for r in rows if name is not None and name in (r.get("name"), r.get("value"))), None)
    if row is None or not isinstance(m.error, PluginError):
        return m
    from nemo_rl_core.registry import KINDS

    kind = KINDS[row["kind"]].label if row["kind"] in KINDS else row["kind"]
    where = row.get("defined_in")
    if where is not None and (where.startswith("<") or "ipykernel" in where):  # typed in, or a cell
        where = None
    script = f"the file {where}" if where else "a notebook, an interpreter or standard input"
    again = f"`python {where}`" if where else "the cells or the script that define it"
    return attrs.evolve(
        m,
        problem=f"The {kind} {row['name']!r} is user code that is not here: the run in {run_dir} had it as "
        f"{row['value']}, defined in {script}, and nothing in this process registers it.",
        suggestion=None,
        fix=f"Start the run again by {again}; or move it into a package with the entry point "
        f"[nemo_rl.{row['kind']}] and install that; or choose another {kind} and another run_dir.",
    )


def _at(tree: Any, keys: Sequence[Any]) -> Any:
    """The name at a place; a component is written as its name or as `{name: ...}`."""
    for key in keys:
        known = key in tree if isinstance(tree, Mapping) else isinstance(key, int) and isinstance(tree, list | tuple)
        if known:
            tree = tree[key]
        elif key != "name":
            return None
    return tree if isinstance(tree, str) else None
