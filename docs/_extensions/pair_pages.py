"""The table of pairs of backends, from the results of their runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["pairs_markdown"]

_RESULTS = Path("benchmarks") / "results" / "backend_pairs.json"


def _row(row: dict[str, Any]) -> str:
    names = " | ".join(f"`{row[name]}`" for name in ("training", "generation", "launcher"))
    rewards = f"{row['rewards'][0]:.3f} → {row['rewards'][-1]:.3f}"
    versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
    return f"| {names} | {rewards} | {row['mismatch'] - 1:.1e} | {versions} |"


def pairs_markdown(root: Path) -> str:
    """One row for each pair that was run."""
    document = json.loads((root / _RESULTS).read_text(encoding="utf-8"))
    head = (
        "| training | generation | launcher | mean reward, step 1 → 5 | mismatch - 1 | ran with |",
        "|---|---|---|---|---|---|",
    )
    return "\n".join([*head, *(_row(row) for row in document["rows"]), ""])
