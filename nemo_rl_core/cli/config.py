"""`nemo-rl config`: start, validate, show, compare and describe configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nemo_rl_core.errors import ConfigError

if TYPE_CHECKING:
    from nemo_rl_core.schema import RunConfig

__all__ = ["app", "diff", "new", "schema", "show", "templates", "validate"]

app = typer.Typer(
    name="config", help="Start, validate, show, compare and describe configurations.", no_args_is_help=True
)

File = Annotated[Path, typer.Argument(help="Configuration file (YAML, JSON or TOML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides: dotted.path=value, such as policy.optimizer.lr=1e-5.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, for programs.")]


@app.command()
def new(
    algorithm: Annotated[str, typer.Argument(help="Algorithm, such as grpo.")],
    template: Annotated[
        str | None, typer.Option("--template", "-t", help="Template to start from; see `nemo-rl config templates`.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; by default it is printed.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
) -> None:
    """Start a configuration from a template of the algorithm's package."""
    from nemo_rl_core.config.templates import config_template

    found = config_template(algorithm, template)
    if out is None:
        typer.echo(found.text, nl=False)
        return
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists. Name another file, or replace it with --overwrite.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(found.text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot write {out}: {error.strerror or error}. Name another file.") from error
    typer.echo(f"Wrote {out}. Next: nemo-rl config validate {out}, then nemo-rl train {out}")


@app.command()
def templates(
    algorithm: Annotated[str | None, typer.Argument(help="Algorithm; by default every one that is installed.")] = None,
    as_json: Json = False,
) -> None:
    """List the templates that `new` starts from."""
    from nemo_rl_core.config.templates import config_templates

    found = config_templates(algorithm)
    if as_json:
        rows = [{"algorithm": t.algorithm, "name": t.name, "summary": t.summary, "path": str(t.path)} for t in found]
        typer.echo(json.dumps(rows, indent=2))
        return
    if not found:
        typer.echo("No template is installed.")
    width = max((len(f"{t.algorithm} {t.name}") for t in found), default=0)
    for t in found:
        typer.echo(f"{f'{t.algorithm} {t.name}':<{width}}  {t.summary}")


@app.command()
def validate(file: File, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a configuration and list every mistake of it. Exit code 0 if there is none, else 2 (3: plugins)."""
    from nemo_rl_core.schema import InvalidConfig

    try:
        config = _final(file, overrides)
    except InvalidConfig as error:
        if not as_json:
            raise
        typer.echo(json.dumps({"valid": False, "mistakes": [m.as_dict() for m in error.mistakes]}, indent=2))
        raise typer.Exit(error.exit_code) from None
    if as_json:
        typer.echo(json.dumps({"valid": True, "algorithm": str(config.algorithm), "mistakes": []}, indent=2))
    else:
        typer.echo(f"{file} is valid (algorithm: {config.algorithm}, model: {config.policy.model_name}).")


@app.command()
def show(
    file: File,
    overrides: Overrides = None,
    output: Annotated[Literal["yaml", "json"], typer.Option("--format", help="yaml or json.")] = "yaml",
    docs: Annotated[bool, typer.Option("--docs", help="Put its documentation above each setting.")] = False,
    changed: Annotated[bool, typer.Option("--changed", help="Only settings that differ from their default.")] = False,
) -> None:
    """Print a configuration as a run would use it, defaults filled in, and what it amounts to."""
    from nemo_rl_core.config import arithmetic, to_dict, to_yaml

    config = _final(file, overrides)
    rows = arithmetic(config)
    if output == "json":
        numbers = [row._asdict() for row in rows]
        typer.echo(json.dumps({"config": to_dict(config, defaults=not changed), "arithmetic": numbers}, indent=2))
        return
    typer.echo(to_yaml(config, docs=docs, defaults=not changed))
    width = max(len(row.quantity) for row in rows)
    for row in rows:
        value = "?" if row.value is None else f"{row.value:,}"
        typer.echo(f"# {row.quantity:<{width}}  {value:>13} {row.unit:<13} {row.why}")


@app.command()
def diff(left: File, right: File, as_json: Json = False) -> None:
    """Compare two configurations setting by setting. Exit code 1 if they differ, as diff does."""
    from nemo_rl_core.config import diff as difference
    from nemo_rl_core.config import load_config

    found = difference(*(load_config(file, check=False) for file in (left, right)))
    if as_json:
        rows = [{"path": d.path, "left": _shown(d.left), "right": _shown(d.right)} for d in found]
        typer.echo(json.dumps(rows, indent=2, default=str))
    elif not found:
        typer.echo("No difference.")
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("setting", str(left), str(right))
        for d in found:
            table.add_row(Text(d.path), Text(_text(d.left)), Text(_text(d.right)))
        Console().print(table)
    raise typer.Exit(1 if found else 0)


@app.command()
def schema(
    algorithm: Annotated[str | None, typer.Option(help="Algorithm whose whole configuration to describe.")] = None,
    kind: Annotated[str | None, typer.Option(help="Kind of a component, such as training_backends.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the component.")] = None,
) -> None:
    """Print the JSON Schema of a configuration or of a component's options, for editors."""
    from nemo_rl_core.config import json_schema

    if algorithm is not None and (kind is not None or name is not None):
        raise ConfigError("config schema takes --algorithm, or --kind with --name, not both.")
    if algorithm is None and (kind is None) != (name is None):
        raise ConfigError("config schema needs --kind and --name together, such as --kind losses --name <loss>.")
    typer.echo(json.dumps(json_schema(_class_of(algorithm, kind, name)), indent=2, default=str))


def _final(file: Path, overrides: list[str] | None) -> RunConfig:
    from nemo_rl_core.config import finalize, load_config

    return finalize(load_config(file, overrides=overrides or ()))


def _class_of(algorithm: str | None, kind: str | None, name: str | None) -> type:
    """Return the configuration class that the options of `schema` name; by default the one that every run has."""
    import attrs

    from nemo_rl_core.registry import get_registry
    from nemo_rl_core.schema import RunConfig

    if algorithm is not None:
        kind, name = "algorithms", algorithm
    if kind is None:
        return RunConfig
    config_class = get_registry().resolve(kind, name).config_class()
    if config_class is None or not attrs.has(config_class):
        raise ConfigError(f"The component {name!r} of {kind} declares no configuration class: it takes any options.")
    return config_class


def _shown(value: object) -> object:
    from nemo_rl_core.config.describing.dump import NOT_SET

    return None if value is NOT_SET else value


def _text(value: object) -> str:
    from nemo_rl_core.config.describing.dump import NOT_SET

    return "-" if value is NOT_SET else json.dumps(value, default=str)
