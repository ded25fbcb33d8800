"""`nemo-rl rollout-report RUN`: the best and the worst rollouts of a run's last recorded step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or a file of rollouts.")],
    top: Annotated[int, typer.Option(min=1, help="Rollouts shown of each end.")] = 3,
) -> None:
    """Show the best and the worst rollouts of a run's last recorded step."""
    from nemo_rl_core.records.jsonl import read_groups

    steps = sorted((run / "rollouts").glob("step_*.jsonl"), key=lambda path: int(path.stem.partition("_")[2]))
    if run.is_dir() and not steps:
        raise typer.BadParameter(f"{run} has no recorded rollouts (rollouts/step_<n>.jsonl)")
    groups = read_groups(steps[-1] if steps else run)
    rollouts = sorted((r for group in groups for r in group.valid), key=lambda r: -r.reward)
    failed = sum(len(group.rollouts) - len(group.valid) for group in groups)
    typer.echo(f"{len(rollouts)} rollouts of {len(groups)} prompts, {failed} failed")
    worst = rollouts[max(top, len(rollouts) - top) :]
    for title, chosen in (("best", rollouts[:top]), ("worst", worst)):
        for rollout in chosen:
            prompt = str(rollout.messages[0].get("content", ""))[-40:]
            typer.echo(f"{title:6} {rollout.reward:8.3f}  {prompt!r} -> {rollout.response[:60]!r}")
