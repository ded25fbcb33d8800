"""`nemo-rl train` and `nemo-rl eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["evaluate", "train"]

ConfigFile = Annotated[Path, typer.Argument(help="Configuration file (YAML, JSON or TOML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides: dotted.path=value, such as policy.optimizer.lr=1e-5.")
]
Json = Annotated[bool, typer.Option("--json", help="JSON lines on standard output, for programs.")]


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    run_dir: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the resolved run, start nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train what a configuration describes.

    Ctrl-C saves the state and ends with exit code 130; the same command then continues.
    """
    from nemo_rl_core._errors import RunInterrupted
    from nemo_rl_core.config import finalize, load_config

    changes = list(overrides or [])
    if run_dir is not None:
        changes.append(f"run_dir={json.dumps(run_dir)}")
    if as_json:
        changes.append("logging.progress=json")
    loaded = finalize(load_config(config, overrides=changes))
    if dry_run:
        _show_plan(loaded, as_json)
        return
    from nemo_rl_core.training.assembly import RunInputs
    from nemo_rl_core.training.trainer import run

    result = run(loaded, RunInputs())
    if result.status == "interrupted":
        raise RunInterrupted(
            f"Stopped after step {result.step}. The state is saved in {result.checkpoint or 'no checkpoint yet'}; "
            "run the same command to continue."
        )
    if as_json:
        return
    typer.echo(f"Finished {result.step} steps. Run folder: {result.run_dir}")
    if result.model_path is not None:
        typer.echo(f"Model: {result.model_path}")


def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="Model to evaluate instead of the configured one.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON-lines file for every rollout.")] = None,
    as_json: Json = False,
) -> None:
    """Sample the validation data of a configuration with its model and score the responses."""
    from nemo_rl_core.config import finalize, load_config
    from nemo_rl_core.training.assembly import RunInputs
    from nemo_rl_core.training.evaluation import evaluate as run_evaluation

    changes = list(overrides or [])
    if model is not None:
        changes.append(f"model={json.dumps(model)}")
    result = run_evaluation(finalize(load_config(config, overrides=changes)), RunInputs(), output=output)
    if as_json:
        typer.echo(json.dumps(result.metrics))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value")
    for name, value in sorted(result.metrics.items()):
        table.add_row(name, f"{value:.4f}")
    Console().print(table)


def _show_plan(config: Any, as_json: bool) -> None:
    """The resolved configuration and the arithmetic of one step."""
    from nemo_rl_core.config import arithmetic, to_dict, to_yaml

    rows = arithmetic(config)
    if as_json:
        typer.echo(json.dumps({"config": to_dict(config), "arithmetic": [list(row) for row in rows]}, default=str))
        return
    typer.echo(to_yaml(config))
    for row in rows:
        typer.echo("  ".join(str(cell) for cell in row))
