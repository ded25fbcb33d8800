"""`nemo-rl replay`: runs the trainer or the sampler alone, with rollouts on disk in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nemo_rl_core.cli.train import ConfigFile, Debug, Json, Overrides

__all__ = ["app", "generate", "train"]

app = typer.Typer(
    help="Train on recorded rollouts without an engine, or sample rollouts without a trainer.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command("train")
def train(
    config: ConfigFile,
    rollouts: Annotated[
        Path, typer.Option(help="File of rollouts (JSON lines), or the folder of a run that recorded them.")
    ],
    overrides: Overrides = None,
    run_dir: Annotated[str | None, typer.Option(help="Folder of this run; by default `<run_dir>-replay`.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train on recorded rollouts: no generation backend, no environment, no data.

    With the weights that sampled them, a step's metrics equal those of the run that recorded them. Starts from the
    configured model each time (checkpointing.resume=never), in a folder of its own.
    """
    from nemo_rl_core.config import finalize, load_config
    from nemo_rl_core.rollouts.recorded import read_recorded
    from nemo_rl_core.training.run import default_run_dir, run
    from nemo_rl_core.training.setup.parts import RunInputs

    changes = ["checkpointing.resume=never", *(overrides or [])]
    if as_json:
        changes.append("logging.progress=json")
    loaded = finalize(load_config(config, overrides=changes))
    folder = run_dir or f"{default_run_dir(loaded)}-replay"
    loaded = finalize(load_config(loaded, overrides={"run_dir": folder}))
    result = run(loaded, RunInputs(recorded=read_recorded(rollouts)))
    if not as_json:
        typer.echo(f"Finished {result.step} steps on {rollouts}. Run folder: {result.run_dir}")


@app.command("generate")
def generate(
    config: ConfigFile,
    out: Annotated[Path, typer.Option(help="JSON-lines file to write.")],
    overrides: Overrides = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts to sample; by default those of one step.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    as_json: Json = False,
) -> None:
    """Sample the training prompts with the configured model: no training backend.

    The rollouts are those that the first steps of a run would sample with these weights.
    """
    from nemo_rl_core.config import finalize, load_config
    from nemo_rl_core.errors import DataError
    from nemo_rl_core.training.sampling import generate_rollouts
    from nemo_rl_core.training.setup.parts import RunInputs

    if out.exists() and not overwrite:
        raise DataError(f"{out} exists. Name another file, or replace it with --overwrite.")
    loaded = finalize(load_config(config, overrides=list(overrides or [])))
    metrics = generate_rollouts(loaded, RunInputs(), out, num_prompts=num_prompts)
    if as_json:
        typer.echo(json.dumps({"out": str(out), **metrics}))
        return
    typer.echo(f"Wrote {out}: mean reward {metrics.get('reward/mean', 0.0):.4f}")
