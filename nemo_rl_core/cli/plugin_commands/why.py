"""`nemo-rl plugins why`: explains how a name is resolved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nemo_rl_core.registry import Registry
    from nemo_rl_core.registry.explaining._why import Resolution

__all__ = ["any_kind", "why"]


def why(
    name: Annotated[str, typer.Argument(help="`name`, `dist:name` or `module:attr`.")],
    kind: Annotated[
        str | None, typer.Option("--kind", help="Kind of component; by default every kind with it.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="Take override lines from its `plugins`.")] = None,
    prefer: Annotated[list[str] | None, typer.Option("--prefer", help="An override line, as name=dist:name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every place a name is looked for, in order, what was found there, what won and why.

    Exit code 3 if the name leads nowhere. The component is not imported; hook plugins are, if no metadata has the name.
    """
    from nemo_rl_core.registry import get_registry
    from nemo_rl_core.registry.explaining._why import kinds_with, resolution

    registry = get_registry()
    plugins = _override_lines(config, prefer or [])
    kinds = [kind] if kind is not None else kinds_with(registry, name) or any_kind(registry, name)
    found = [resolution(registry, each, name, plugins=plugins) for each in kinds]
    if as_json:
        typer.echo(json.dumps([_as_dict(one) for one in found], indent=2))
    else:
        for one in found:
            _print(one)
    if not any(one.winner for one in found):
        raise typer.Exit(3)


def any_kind(registry: Registry, name: str) -> list[str]:
    """Where the closest name is; for a name like no other, an error that says what to do."""
    from difflib import get_close_matches

    from nemo_rl_core.errors import PluginNotFound

    names = {ref.name: ref.kind for ref in registry.entries(full=True)}
    close = get_close_matches(name, names, n=1)
    if close:
        return [names[close[0]]]
    raise PluginNotFound(
        f"No kind has a component named {name!r}, no disabled plugin and no known package either. "
        "`nemo-rl plugins list --all` shows what is installed; with --kind KIND the places are shown one by one."
    )


def _override_lines(config: Path | None, prefer: list[str]) -> dict[str, str]:
    from nemo_rl_core.errors import ConfigError

    lines: dict[str, str] = {}
    if config is not None:
        from nemo_rl_core.config import load_config

        lines.update(load_config(config, check=False).plugins)
    for line in prefer:
        name, equals, full = line.partition("=")
        if not equals or ":" not in full:
            raise ConfigError(f"--prefer {line!r}: expected name=dist:name, such as --prefer fast=acme:fast.")
        lines[name] = full
    return lines


def _as_dict(found: Resolution) -> dict[str, Any]:
    return {
        "kind": found.kind,
        "name": found.name,
        "steps": [{"place": s.place, "found": s.found, "decides": s.decides} for s in found.steps],
        "resolved": found.winner.qualified_name if found.winner else None,
        "value": found.winner.value if found.winner else None,
        "error": str(found.error) if found.error else None,
    }


def _print(found: Resolution) -> None:
    from nemo_rl_core.registry._manifest import aligned
    from nemo_rl_core.registry.discovery._kinds import KINDS

    typer.echo(f"{KINDS[found.kind].label} {found.name}")
    rows = [(f"  {i}.", s.place, s.found + ("   <- wins" if s.decides else "")) for i, s in enumerate(found.steps, 1)]
    for line in aligned(rows):
        typer.echo(line)
    if found.winner is not None:
        ref = found.winner
        provider = f"{ref.distribution} {ref.version}" if ref.distribution else ref.origin
        typer.echo(f"  => {ref.qualified_name} ({provider}, {ref.value})\n     {found.reason}\n")
    else:
        typer.echo(f"  => nothing: {found.reason}\n")
