"""`nemo-rl plugins list` and `show`: installed components, from metadata; only `show` imports the component."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nemo_rl_core.cli._lazy import CoreCommand, LazyCommand, load_core
from nemo_rl_core.errors import PluginError
from nemo_rl_core.registry import KINDS, ComponentRef, Registry, get_registry
from nemo_rl_core.registry.discovery._distributions import normalize
from nemo_rl_core.registry.discovery._index import Entry, Selection
from nemo_rl_core.registry.explaining._hook_source import implemented_hooks

__all__ = ["app", "list_plugins", "show"]

_MORE: dict[str, CoreCommand] = {
    "why": CoreCommand("nemo_rl_core.cli.plugin_commands.why:why", "Show how a name is resolved, place by place."),
    "check": CoreCommand("nemo_rl_core.cli.plugin_commands.check:check", "Run the conformance kit of a component."),
    "doctor": CoreCommand(
        "nemo_rl_core.cli.plugin_commands.doctor:doctor", "Look for what is wrong, each with its fix."
    ),
    "new": CoreCommand("nemo_rl_core.cli.plugin_commands.new:new", "Make a plugin package from a template."),
}


class _Commands(TyperGroup):
    """`list` and `show`, which stand here, and those that are imported when they are invoked."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *_MORE]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = _MORE.get(cmd_name)
        if found is None:
            return super().get_command(ctx, cmd_name)
        return LazyCommand(cmd_name, found.help, lambda: load_core(cmd_name, found))


app = typer.Typer(
    cls=_Commands,
    help="List and describe what is installed.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
KindOption = Annotated[str | None, typer.Option("--kind", help=f"One of: {', '.join(KINDS)}.")]


@app.command("list")
def list_plugins(
    kind: KindOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also ask plugins for components that metadata does not list; imports them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List installed components. Nothing is imported, except with --all."""
    registry = get_registry()
    if registry.strict:
        registry.check()
    rows = [_row(ref) for ref in registry.entries(kind, full=everything)]
    if kind is None:
        rows += [{**_entry_row("hooks", e), "hooks": implemented_hooks(e.value)} for e in registry.index.hooks()]
        rows += [_entry_row("?", entry) for entry in registry.index.misplaced()]
    rows += _disabled(registry, kind)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    columns = ("kind", "name", "distribution", "version", "api_version", "state")
    _print_aligned([columns, *([_text(row[c]) for c in columns] for row in rows)])
    for row in rows:
        if row.get("hooks"):
            typer.echo(f"hooks of {row['distribution']}: {row['name']}: {', '.join(row['hooks'])}")
    for row in rows:
        if row["error"]:
            typer.echo(f"{row['state']}: {row['name']}: {row['error']}")


def _print_aligned(rows: Sequence[Sequence[str]]) -> None:
    """Plain columns: they can be cut with other tools, and rich would take longer than all the rest."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _row(ref: ComponentRef) -> dict[str, Any]:
    error: PluginError | None = None
    try:
        ref.check()
    except PluginError as found:
        error = found
    return {
        "kind": ref.kind,
        "name": ref.name,
        "distribution": ref.distribution,
        "version": ref.version,
        "api_version": ref.api_version,
        "value": ref.value,
        "origin": ref.origin,
        "state": ref.state,
        "error": str(error) if error else None,
    }


def _entry_row(kind: str, entry: Entry, refusal: str | None = None) -> dict[str, Any]:
    state = "disabled" if refusal else "broken" if entry.problem else "found"
    return {
        "kind": kind,
        "name": entry.name,
        "distribution": entry.distribution.name,
        "version": entry.distribution.version,
        "api_version": None,
        "value": entry.value,
        "origin": "entry point",
        "state": state,
        "error": refusal or entry.problem,
    }


def _disabled(registry: Registry, kind: str | None) -> list[dict[str, Any]]:
    selection = Selection.from_environment()
    rows = [
        _entry_row(e.group.removeprefix("nemo_rl."), e, selection.refusal(e.distribution.name) or "disabled")
        for e in registry.index.disabled
    ]
    return [row for row in rows if kind is None or row["kind"] == kind]


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Component (`name` or `dist:name`) or distribution.")],
    kind: KindOption = None,
    as_json: Json = False,
) -> None:
    """Describe components: origin, API version, options. Imports those it shows."""
    registry = get_registry()
    refs = _named(registry, name, kind)
    if not refs:
        _raise_not_found(registry, name, kind)
    shown = [_details(ref) for ref in refs]
    if as_json:
        typer.echo(json.dumps(shown, indent=2))
    else:
        for details in shown:
            _print_details(details)
    if any(details["state"] == "broken" for details in shown):
        raise typer.Exit(PluginError.exit_code)


def _named(registry: Registry, name: str, kind: str | None) -> list[ComponentRef]:
    for full in (False, True):  # plugins are asked only when metadata does not know the name
        refs = registry.entries(kind, full=full)
        found = [ref for ref in refs if name in (ref.name, ref.qualified_name)]
        found = found or [ref for ref in refs if ref.distribution == normalize(name)]
        if found:
            return found
    return []


def _raise_not_found(registry: Registry, name: str, kind: str | None) -> None:
    from nemo_rl_core.errors import PluginNotFound
    from nemo_rl_core.registry._messages import known_package

    for each in [kind] if kind is not None else KINDS:
        if kind is not None or known_package(each, name):
            registry.resolve(each, name)
    from difflib import get_close_matches

    close = get_close_matches(name, {ref.name for ref in registry.entries()}, n=1)
    fix = f"Did you mean {close[0]!r}?" if close else "`nemo-rl plugins list` shows what is installed."
    raise PluginNotFound(f"Nothing of the name {name!r} is installed. {fix}")


def _details(ref: ComponentRef) -> dict[str, Any]:
    component: object = None
    with contextlib.suppress(PluginError):  # the state and the traceback tell
        component = ref.load()
    config_class = getattr(component, "config_class", None)
    doc = (getattr(component, "__doc__", None) or "").strip()
    return {
        **_row(ref),
        "qualified_name": ref.qualified_name,
        "protocol": KINDS[ref.kind].protocol,
        "summary": doc.partition("\n\n")[0].replace("\n", " "),
        "config_class": f"{config_class.__module__}:{config_class.__qualname__}" if config_class else None,
        "options": _options(config_class, shared=_shared_root(ref.kind)),
        "traceback": ref.traceback,
    }


def _options(config_class: object, *, shared: type | None) -> list[dict[str, Any]]:
    """A row for each setting of a component; those that every configuration of its kind has are left out."""
    import attrs

    from nemo_rl_core.config.describing.reference import describe

    if not (isinstance(config_class, type) and attrs.has(config_class)):
        return []
    known = {f.name for f in attrs.fields(shared)} if shared is not None else set()
    return [
        {
            "name": row.path,
            "type": row.type,
            "allowed": row.allowed,
            "default": "required" if row.default == "(required)" else json.dumps(row.default, default=str),
            "unit": row.unit,
            "description": " ".join(row.doc.split()),
        }
        for row in describe(config_class)
        if row.path.partition(".")[0] not in known
    ]


def _shared_root(kind: str) -> type | None:
    """The class whose fields every algorithm's configuration has."""
    if kind != "algorithms":
        return None
    from nemo_rl_core.schema import RunConfig

    return RunConfig


def _print_details(details: dict[str, Any]) -> None:
    typer.echo(f"{KINDS[details['kind']].label} {details['name']}")
    if details["summary"]:
        typer.echo(f"  {details['summary']}")
    provider = f"{details['distribution']} {details['version']}" if details["distribution"] else details["origin"]
    typer.echo(f"  from         {provider} ({details['value']})")
    typer.echo(f"  full name    {details['qualified_name']}")
    typer.echo(f"  contract     {details['protocol'] or 'a callable'}, API version {details['api_version']}")
    typer.echo(f"  state        {details['state']}")
    if details["error"]:
        typer.echo(f"  {details['error']}")
    if details["traceback"]:
        typer.echo(f"\n{details['traceback']}")
    if details["options"]:
        typer.echo(f"  options      {details['config_class']}")
        columns = ("name", "allowed", "default", "unit", "description")
        _print_table(columns, [[row[c] or "" for c in columns] for row in details["options"]])
    typer.echo("")


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column in ("name", "kind", "distribution"))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
