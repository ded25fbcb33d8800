"""`nemo-rl plugins new`: writes a plugin package from a template."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["new"]


def new(
    kind: Annotated[str | None, typer.Argument(help="Kind of component, such as loss or environment.")] = None,
    name: Annotated[str | None, typer.Argument(help="Name of the component, such as my_loss.")] = None,
    path: Annotated[Path, typer.Option("--path", help="Folder in which the package's folder is made.")] = Path("."),
    distribution: Annotated[str | None, typer.Option(help="Name of the package to install.")] = None,
    package: Annotated[str | None, typer.Option(help="Name of the package to import.")] = None,
    update: Annotated[
        Path | None, typer.Option("--update", help="Bring the frame of a package made before up to this core.")
    ] = None,
) -> None:
    """Make a plugin package: a working component, its conformance test, pyproject, README and CI file."""
    from nemo_rl_core.cli.plugin_commands.templates import kind_named, new_plugin, update_plugin
    from nemo_rl_core.errors import ConfigError

    if update is not None:
        changed = update_plugin(update)
        typer.echo("\n".join(["Changed:", *changed]) if changed else "Nothing to change.")
        return
    if kind is None or name is None:
        raise ConfigError("Give a kind and a name: nemo-rl plugins new KIND NAME, such as `new loss my_loss`.")
    folder = new_plugin(kind, name, path, distribution=distribution, package=package)
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        typer.echo(f"  {file.relative_to(path)}")
    typer.echo(f"\nNext: cd {folder} && pip install -e . pytest && pytest")
    typer.echo(f"Then: nemo-rl plugins show {name} --kind {kind_named(kind)}")
