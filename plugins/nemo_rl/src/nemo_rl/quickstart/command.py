"""`nemo-rl quickstart`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    run_dir: Annotated[Path, typer.Option(help="Folder for all output.")] = Path("quickstart-run"),
    seed: Annotated[int, typer.Option(help="Seed of model, data and sampling.")] = 0,
    generation_backend: Annotated[
        str, typer.Option(help="Engine that samples: `torch_engine`, or another installed backend such as `vllm`.")
    ] = "torch_engine",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end, for programs.")] = False,
) -> None:
    """Train a small model on this machine's CPU: warm start by SFT, then GRPO. No network, no GPU."""
    from nemo_rl.quickstart.recipe import run_quickstart
    from nemo_rl_core.errors import RunInterrupted

    try:
        result = run_quickstart(
            run_dir,
            seed=seed,
            generation_backend=generation_backend,
            progress="none" if as_json else "auto",
            announce=(lambda text: None) if as_json else typer.echo,
        )
    except KeyboardInterrupt:
        raise RunInterrupted(f"Stopped. Run `nemo-rl quickstart --run-dir {run_dir}` again to continue.") from None
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "seed": result.seed,
                    "generation_backend": result.generation_backend,
                    "accuracy_before": result.accuracy_before,
                    "accuracy_after": result.accuracy_after,
                    "greedy_before": result.greedy_before,
                    "greedy_after": result.greedy_after,
                    "sft_steps": result.sft.step,
                    "grpo_steps": result.grpo.step,
                    "reward_first": result.grpo.history[0].get("reward/mean"),
                    "reward_last": result.grpo.history[-1].get("reward/mean"),
                    "seconds": result.seconds,
                    "report": str(result.report),
                    "model": str(result.grpo.model_path),
                }
            )
        )
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("held-out accuracy", "after warm start", "after GRPO")
    table.add_row("sampled", f"{result.accuracy_before:.3f}", f"{result.accuracy_after:.3f}")
    table.add_row("greedy", f"{result.greedy_before:.3f}", f"{result.greedy_after:.3f}")
    console.print(table)
    answers = Table("task", "after warm start", "after GRPO", title="Sample generations")
    later = {sample.prompt: sample for sample in result.samples_after}
    for sample in result.samples_before[:8]:
        other = later.get(sample.prompt)
        answers.add_row(sample.prompt, _marked(sample), _marked(other) if other else "")
    console.print(answers)
    console.print(f"{result.seconds:.0f} s in all. Report: {result.report}   Model: {result.grpo.model_path}")


def _marked(sample: object) -> str:
    from rich.markup import escape

    response = escape(str(getattr(sample, "response", "")))
    return f"[green]{response}[/green]" if getattr(sample, "reward", 0.0) > 0.5 else f"[red]{response}[/red]"
