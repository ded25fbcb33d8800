"""The command reference, from the command-line application itself."""

from __future__ import annotations

from typing import Any

__all__ = ["command_line_markdown"]


def _command_tree() -> Any:
    """The root command behind `nemo-rl`."""
    from nemo_rl_core.cli._app import command

    return command()


def _resolved(command: Any, path: str) -> tuple[Any, list[tuple[str, Any]]]:
    """The command behind a stand-in that is loaded when invoked, and its sub-commands by name."""
    context = command.make_context(path, [], resilient_parsing=True)
    command = context.command
    if not hasattr(command, "list_commands"):
        return command, []
    children = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
    return command, [(name, child) for name, child in children if child is not None and not child.hidden]


def _option_row(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    if parameter.param_type_name == "argument":
        names = f"`{(parameter.metavar or parameter.name).upper()}`"
    text = " ".join((getattr(parameter, "help", None) or "").split()).replace("|", "\\|")
    return f"| {names} | {text} |"


def _section(command: Any, path: str, level: int) -> list[str]:
    command, children = _resolved(command, path)
    out = [f"{'#' * level} `{path}`", "", " ".join((command.help or "").split()), ""]
    rows = [_option_row(p) for p in command.params if not getattr(p, "hidden", False)]
    if rows:
        out += ["| Option | Meaning |", "|---|---|", *rows, ""]
    for name, child in children:
        out += _section(child, f"{path} {name}", min(level + 1, 4))
    return out


def command_line_markdown() -> str:
    """Every command with its options."""
    try:
        tree = _command_tree()
    except ImportError as error:
        return f"The command line is not installed here ({error})."
    return "\n".join(_section(tree, "nemo-rl", 2))
