"""`nemo-rl plan`: estimates a run on a cluster that is not here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_rl_core.cli.train import ConfigFile, Json, Overrides

if TYPE_CHECKING:
    from rich.table import Table

    from nemo_rl_core.planning.memory import MemoryEstimate
    from nemo_rl_core.planning.plan import PlannedRun
    from nemo_rl_core.planning.rates import Rates
    from nemo_rl_core.schema import RunConfig

__all__ = ["plan"]


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    rates_from: Annotated[Path | None, typer.Option(help="Folder of a run that measured the rates.")] = None,
    engines: Annotated[
        int | None, typer.Option(min=1, help="Generation engines; by default those that the run would start.")
    ] = None,
    staleness: Annotated[
        list[int] | None, typer.Option(min=0, help="rollouts.staleness to compare; may be given several times.")
    ] = None,
    engine_tokens_per_s: Annotated[
        float | None, typer.Option(help="New tokens per second of one engine at a full batch.")
    ] = None,
    engine_batch: Annotated[int | None, typer.Option(help="Sequences that one engine decodes together.")] = None,
    sequence_tokens_per_s: Annotated[
        float | None, typer.Option(help="New tokens per second of one sequence, however few are beside it.")
    ] = None,
    trainer_tokens_per_s: Annotated[
        float | None, typer.Option(help="Prompt and response tokens per second of one training worker.")
    ] = None,
    response_tokens: Annotated[float | None, typer.Option(help="Mean new tokens of one turn.")] = None,
    response_spread: Annotated[
        float | None, typer.Option(help="Standard deviation over mean of the response lengths; 1 is a long tail.")
    ] = None,
    prompt_tokens: Annotated[float | None, typer.Option(help="Mean tokens of a prompt.")] = None,
    environment_s: Annotated[float | None, typer.Option(help="Seconds of one answer of the environment.")] = None,
    refit_s: Annotated[float | None, typer.Option(help="Seconds of one weight update.")] = None,
    device_memory_gib: Annotated[
        float | None, typer.Option(min=0.0, help="Memory of one device, to compare with what is needed.")
    ] = None,
    steps: Annotated[int, typer.Option(min=4, help="Steps to simulate.")] = 12,
    as_json: Json = False,
) -> None:
    """Predict step time, idle shares and memory of a configuration on a cluster that is not here.

    The real run loop is simulated on a virtual clock, with engines and trainers of the given speeds. Command-line
    values take precedence over those that the run of --rates-from measured.
    """
    from attrs import asdict, evolve

    from nemo_rl_core.config import finalize, load_config
    from nemo_rl_core.errors import ConfigError
    from nemo_rl_core.planning.memory import estimate_memory
    from nemo_rl_core.planning.plan import plan_run
    from nemo_rl_core.planning.rates import Rates, rates_from_run

    given = {
        "engine_tokens_per_s": engine_tokens_per_s,
        "engine_batch": engine_batch,
        "sequence_tokens_per_s": sequence_tokens_per_s,
        "trainer_tokens_per_s": trainer_tokens_per_s,
        "response_tokens": response_tokens,
        "response_spread": response_spread,
        "prompt_tokens": prompt_tokens,
        "environment_s": environment_s,
        "refit_s": refit_s,
    }
    loaded = finalize(load_config(config, overrides=list(overrides or [])))
    if not _samples(loaded):
        raise ConfigError(f"algorithm: {loaded.algorithm} is trained on rows and samples nothing; there is no plan.")
    measured = {} if rates_from is None else rates_from_run(rates_from)
    rates = Rates(**{**measured, **{name: value for name, value in given.items() if value is not None}})
    planned = [
        plan_run(
            evolve(loaded, rollouts=evolve(loaded.rollouts, staleness=bound)),
            rates,
            num_engines=engines,
            num_steps=steps,
            seed=loaded.seed,
        )
        for bound in staleness or [loaded.rollouts.staleness]
    ]
    memory = estimate_memory(loaded, rates, planned[0].engines)
    if as_json:
        runs = [_as_dict(run) for run in planned]
        typer.echo(json.dumps({"rates": asdict(rates), "runs": runs, "memory_bytes": memory.as_dict()}))
        return
    _print(loaded, rates, planned, memory, device_memory_gib)


def _samples(config: RunConfig) -> bool:
    """Whether the algorithm is fed with rollouts."""
    from nemo_rl_core.protocols.algorithm import feed_of
    from nemo_rl_core.registry import get_registry

    algorithm = get_registry().resolve("algorithms", config.algorithm, plugins=config.plugins).load()
    return feed_of(algorithm, config) == "rollouts"


def _as_dict(run: PlannedRun) -> dict[str, Any]:
    result = run.result
    return {
        "staleness": run.staleness,
        "num_engines": run.engines.num_engines,
        "devices_per_engine": run.engines.devices_per_engine,
        "shares_devices": run.engines.shares_devices,
        "num_trainers": run.num_trainers,
        "step_s": result.step_s,
        "generation_s": run.generation_s,
        "training_s": run.training_s,
        "bound_s": run.bound_s,
        "efficiency": run.efficiency,
        "trainer_idle": result.trainer_idle,
        "engine_idle": 1 - result.engine_busy,
        "tokens_per_s": result.tokens_per_s,
        "age_mean": result.age_mean,
        "age_max": result.age_max,
    }


def _print(
    config: RunConfig,
    rates: Rates,
    planned: list[PlannedRun],
    memory: MemoryEstimate,
    device_memory_gib: float | None,
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    first = planned[0]
    console.print(
        f"{config.num_items_per_step} prompts x {config.group_size} rollouts a step; "
        f"{_engines(first)}, {first.num_trainers} training workers"
        f"{' on the same devices' if first.engines.shares_devices else ''}",
        highlight=False,
    )
    table = Table(
        *("stale-\nness", "step", "bound", "of\nbound", "trainer\nidle", "engine\nidle", "tokens\n/s"),
        *("age\nmean", "age\nmax"),
    )
    for run in planned:
        found = run.result
        table.add_row(
            str(run.staleness),
            f"{found.step_s:.4g} s",
            f"{run.bound_s:.4g} s",
            f"{run.efficiency:.0%}",
            f"{found.trainer_idle:.0%}",
            f"{1 - found.engine_busy:.0%}",
            f"{found.tokens_per_s:,.0f}",
            f"{found.age_mean:.2f}",
            f"{found.age_max:.0f}",
        )
    console.print(table)
    console.print(_memory_table(memory))
    for hint in (*_hints(config, rates, first), *_memory_hints(memory, device_memory_gib)):
        console.print(f"- {hint}", highlight=False)


def _memory_table(memory: MemoryEstimate) -> Table:
    from rich.table import Table

    table = Table("memory of one device", "held", "computing", "in all")
    for name, model in memory.models.items():
        kind = "weights, gradients, optimizer" if model.trained else "weights"
        table.add_row(
            f"worker of {name} ({kind}; activations)", *map(_size, (model.held, model.computing, model.total))
        )
    sizes = (memory.engine_weights, memory.engine_cache, memory.engine)
    table.add_row("engine (weights; keys and values)", *map(_size, sizes))
    if memory.sharing != "apart":
        how = "in turn" if memory.sharing == "in_turn" else "together"
        table.add_row(f"all of them on one device, {how}", "", "", _size(memory.device))
    return table


def _memory_hints(memory: MemoryEstimate, device_memory_gib: float | None) -> list[str]:
    longest = _size(memory.engine_cache_longest)
    hints = [*memory.notes, f"Keys and values take {longest} if every sequence of an engine is at its longest."]
    if device_memory_gib is not None:
        needed, given = memory.device / 2**30, device_memory_gib
        fits = "fits" if needed <= given else "does not fit"
        hints.append(f"The fullest device needs {needed:.1f} GiB, which {fits} in {given:g} GiB.")
    return hints


def _engines(run: PlannedRun) -> str:
    number, devices = run.engines.num_engines, run.engines.devices_per_engine
    return f"{number} engine{'s' * (number > 1)}" + (f" of {devices} devices" if devices > 1 else "")


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _hints(config: RunConfig, rates: Rates, run: PlannedRun) -> list[str]:
    """Show what prevents the run."""
    hints = []
    places = run.engines.num_engines * rates.engine_batch
    rollouts = config.num_items_per_step * config.group_size
    if config.rollouts.max_in_flight < min(places, rollouts):
        hints.append(
            f"rollouts.max_in_flight={config.rollouts.max_in_flight} leaves places of the engines empty: they have "
            f"{places}, and a step has {rollouts} rollouts."
        )
    if run.result.failed > 0:
        hints.append(
            f"{run.result.failed:.1%} of the rollouts pass rollouts.generation_timeout_s="
            f"{config.rollouts.generation_timeout_s:g} and are lost."
        )
    if run.generation_s > 1.25 * run.training_s:
        hints.append(f"Generation is the slower side by {run.generation_s / run.training_s:.1f}x: add engines.")
    elif run.training_s > 1.25 * run.generation_s:
        hints.append(f"Training is the slower side by {run.training_s / run.generation_s:.1f}x: add training workers.")
    return hints
