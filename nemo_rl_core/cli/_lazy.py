"""A group of commands that are imported only when invoked."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command as typer_command

from nemo_rl_core.registry.discovery._index import Entry, Index, Selection

__all__ = ["CORE_COMMANDS", "Command", "CoreCommand", "LazyCommand", "LazyGroup", "as_command", "load_core"]


class Command(Protocol):
    """What typer and click both have for a command; the classes of typer's commands are private to it."""

    @property
    def make_context(self) -> Callable[..., Any]:
        """Method that parses the arguments of a call."""
        ...


class CoreCommand(NamedTuple):
    """A command of the core, known before its module is imported."""

    target: str
    """`module:attr` of a typer app or of a function with annotated parameters."""
    help: str


CORE_COMMANDS: dict[str, CoreCommand] = {
    "train": CoreCommand("nemo_rl_core.cli.train:train", "Train what a configuration describes."),
    "eval": CoreCommand("nemo_rl_core.cli.train:evaluate", "Score a model on the validation data."),
    "replay": CoreCommand("nemo_rl_core.cli.replay:app", "Train on recorded rollouts, or sample without a trainer."),
    "plan": CoreCommand("nemo_rl_core.cli.plan:plan", "Predict step time and memory on a cluster that is not here."),
    "config": CoreCommand("nemo_rl_core.cli.config:app", "Start, validate, show, compare and describe configurations."),
    "plugins": CoreCommand("nemo_rl_core.cli.plugin_commands.listing:app", "List and describe what is installed."),
}


class LazyCommand(TyperCommand):
    """Stands for a command in listings and completion; the real one is made when it is invoked."""

    def __init__(self, name: str, help: str, load: Callable[[], Command]) -> None:
        super().__init__(name=name, help=help, short_help=help)
        self._load = load

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: object) -> Any:
        """Import the real command and return its context."""
        return self._load().make_context(info_name, args, parent=parent, **extra)


class LazyGroup(TyperGroup):
    """The core's commands and those of group `nemo_rl.commands`, listed from metadata alone."""

    @cached_property
    def _plugins(self) -> list[Entry]:
        return Index(Selection.from_environment()).of("commands")

    def list_commands(self, ctx: object) -> list[str]:
        """Return the core's commands in their order, then those of plugins by name."""
        return list(dict.fromkeys([*CORE_COMMANDS, *(entry.name for entry in self._plugins)]))

    def get_command(self, ctx: object, cmd_name: str) -> LazyCommand | None:
        """Return a stand-in for the command, or None if there is none of that name."""
        core = CORE_COMMANDS.get(cmd_name)
        if core is not None:
            return LazyCommand(cmd_name, core.help, lambda: load_core(cmd_name, core))
        providers = [e for e in self._plugins if cmd_name in (e.name, f"{e.distribution.name}:{e.name}")]
        if not providers:
            return None
        names = ", ".join(f"{entry.distribution.name} {entry.distribution.version}" for entry in providers)
        return LazyCommand(cmd_name, f"(from {names})", lambda: _load_plugin(cmd_name))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find the command as typer does; if its plugin is not installed, say which package to install."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            from nemo_rl_core.registry._messages import known_package

            if known_package("commands", args[0]) is not None:
                from nemo_rl_core.registry import get_registry

                get_registry().resolve("commands", args[0])  # raises, with the package to install
        return super().resolve_command(ctx, args)


def load_core(name: str, core: CoreCommand) -> Command:
    """Import the module of one of the core's own commands and return its command object."""
    module, _, attribute = core.target.partition(":")
    return as_command(getattr(importlib.import_module(module), attribute), name)


def _load_plugin(name: str) -> Command:
    from nemo_rl_core.registry import get_registry

    return as_command(get_registry().resolve("commands", name).load(), name)


def as_command(found: typer.Typer | Command | Callable[..., object], name: str | None = None) -> Command:
    """Return the command object of a typer app, a command, or a plain function with annotated parameters."""
    if isinstance(found, typer.Typer):
        app = found
    elif hasattr(found, "make_context"):
        return found
    else:
        app = typer.Typer(rich_markup_mode=None)
        app.command(name)(found)
    command = typer_command(app)
    # A typer app offers to install completion for itself; only the root can.
    command.params = [p for p in command.params if p.name not in ("install_completion", "show_completion")]
    return command
