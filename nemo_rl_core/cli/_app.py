"""The root of the command line and its global options."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from typer.main import get_command

from nemo_rl_core._version import __version__
from nemo_rl_core.cli._boundary import RootCommand, switch_on_debug
from nemo_rl_core.cli._lazy import LazyGroup
from nemo_rl_core.registry.discovery._index import ALLOW_VARIABLE, DEBUG_VARIABLE, STRICT_VARIABLE

__all__ = ["app", "command"]

app = typer.Typer(
    name="nemo-rl",
    cls=LazyGroup,
    help="Post-training for language models, made of plugins.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,  # plain help: formatting it with rich would take longer than the rest
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nemo-rl-core {__version__}")
        raise typer.Exit


# The switches are kept in the environment, so that they reach worker processes. They are eager, so that
# they hold before `--help` lists commands.


def _strict(wanted: bool) -> None:
    if wanted:
        os.environ[STRICT_VARIABLE] = "1"


def _no_plugins(wanted: bool) -> None:
    if wanted:
        os.environ[ALLOW_VARIABLE] = ""


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    strict_plugins: Annotated[
        bool,
        typer.Option("--strict-plugins", callback=_strict, is_eager=True, help="Any broken plugin is an error."),
    ] = False,
    no_plugins: Annotated[
        bool,
        typer.Option("--no-plugins", callback=_no_plugins, is_eager=True, help="Use nothing but the core."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            callback=switch_on_debug,
            is_eager=True,
            help="Show tracebacks, and which plugin's code runs when.",
        ),
    ] = False,
) -> None:
    """Post-training for language models, made of plugins."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    switch_on_debug(bool(os.environ.get(DEBUG_VARIABLE)))


def command() -> RootCommand:
    """Return the root command."""
    return get_command(app)
