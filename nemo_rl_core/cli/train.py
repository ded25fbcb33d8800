"""`nemo-rl train` and `nemo-rl eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_rl_core.cli._boundary import switch_on_debug

if TYPE_CHECKING:
    from nemo_rl_core.schema import RunConfig
    from nemo_rl_core.training.evaluation import EvaluationResult

__all__ = ["evaluate", "train"]

ConfigFile = Annotated[Path, typer.Argument(help="Configuration file (YAML, JSON or TOML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides: dotted.path=value, such as policy.optimizer.lr=1e-5.")
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        callback=switch_on_debug,
        help="Write which plugin's code ran when to debug.jsonl in the run folder and to the log; show tracebacks.",
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option("--cluster", metavar="LAUNCHER", help="Where it runs: the launcher to use (cluster.launcher)."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON lines on standard output, for programs.")]


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    run_dir: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    cluster: Cluster = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the resolved run, start nothing.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train what a configuration describes.

    Ctrl-C saves the state and ends with exit code 130; the same command then continues.
    """
    from nemo_rl_core.config import finalize, load_config
    from nemo_rl_core.errors import RunInterrupted

    changes = list(overrides or [])
    if run_dir is not None:
        changes.append(f"run_dir={json.dumps(run_dir)}")
    if cluster is not None:
        changes.append(_on(cluster))
    if as_json:
        changes.append("logging.progress=json")
    loaded = finalize(load_config(config, overrides=changes))
    if dry_run:
        _check_models(loaded)
        _show_plan(loaded, as_json)
        return
    from nemo_rl_core.training.run import run
    from nemo_rl_core.training.setup.parts import RunInputs

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
    cluster: Cluster = None,
    as_json: Json = False,
) -> None:
    """Sample the validation data of a configuration with its model and score the responses.

    Sampling and scores (pass@k, cons@k, runs, subsets) are set in `evaluation` of the configuration, such as
    evaluation.num_generations_per_prompt=8 evaluation.temperature=1.
    """
    from nemo_rl_core.config import finalize, load_config
    from nemo_rl_core.training.evaluation import evaluate as run_evaluation
    from nemo_rl_core.training.setup.parts import RunInputs

    changes = list(overrides or [])
    if model is not None:
        changes.append(f"model={json.dumps(model)}")
    if cluster is not None:
        changes.append(_on(cluster))
    result = run_evaluation(finalize(load_config(config, overrides=changes)), RunInputs(), output=output)
    if as_json:
        typer.echo(json.dumps(_result_as_dict(result)))
        return
    _print_result(result)


def _on(launcher: str) -> str:
    """Return the override for `--cluster`."""
    return f"cluster.launcher={json.dumps(launcher)}"


def _result_as_dict(result: EvaluationResult) -> dict[str, Any]:
    """Return `metrics` (means over the runs), `std`, `runs`, and by subset `subsets` and `subset_std`."""
    names = ("metrics", "std", "runs", "subsets", "subset_std")
    return {name: getattr(result, name) for name in names}


def _print_result(result: EvaluationResult) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    spread = [f"std of {len(result.runs)} runs"] if result.std else []
    table = Table("metric", "mean" if spread else "value", *spread)
    for name in sorted(result.metrics, key=_order):
        cells = [f"{result.metrics[name]:.4f}"] + ([f"{result.std[name]:.4f}"] if name in result.std else [])
        table.add_row(Text(name), *cells)
    console.print(table)
    if not result.subsets:
        return
    columns = sorted({name for found in result.subsets.values() for name in found}, key=_order)
    table = Table("subset", *columns)
    for subset, found in result.subsets.items():
        std = result.subset_std.get(subset, {})
        cells = [f"{found[n]:.4f}" + (f" ± {std[n]:.4f}" if n in std else "") if n in found else "-" for n in columns]
        table.add_row(Text(subset), *cells)
    console.print(table)


def _order(name: str) -> tuple[int, str, int]:
    """Return a sorting key: scores first, pass@2 before pass@10."""
    stem, _, k = name.partition("@")
    return (0 if name == "accuracy" else 1 if k else 2, stem, int(k or 0))


def _check_models(config: RunConfig) -> None:
    """Check that the models fit their backends, as far as that can be told without starting a worker."""
    from nemo_rl_core.errors import ConfigError
    from nemo_rl_core.schema import InvalidConfig
    from nemo_rl_core.training.setup.model_checks import check_models, configured_models

    try:
        check_models(configured_models(config))
    except InvalidConfig:
        raise
    except ConfigError as error:  # such as a hub that only the cluster can reach
        typer.echo(f"Whether the sizes of the models fit is not checked. {error}", err=True)


def _show_plan(config: RunConfig, as_json: bool) -> None:
    """Print the resolved configuration and the arithmetic of one step."""
    from nemo_rl_core.config import arithmetic, to_dict, to_yaml

    rows = arithmetic(config)
    if as_json:
        typer.echo(json.dumps({"config": to_dict(config), "arithmetic": [list(row) for row in rows]}, default=str))
        return
    typer.echo(to_yaml(config))
    for row in rows:
        typer.echo("  ".join(str(cell) for cell in row))
