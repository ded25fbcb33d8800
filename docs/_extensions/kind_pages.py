"""One page for each kind of component: where it is registered, its contract from the protocol, its clauses."""

from __future__ import annotations

from pathlib import Path

from api_pages import class_markdown
from kit_pages import clause_sections
from source_reader import Module, markdown, read_module

from nemo_rl_core.registry import KINDS, Kind

__all__ = ["write_kind_pages"]

_WITHOUT_PROTOCOL = {"callbacks": "nemo_rl_core.training.callbacks:Callback"}
_CHOSEN_BY = {
    "algorithms": "`algorithm: <name>`",
    "losses": "`loss: <name>` of an algorithm's configuration",
    "advantages": "`advantage: <name>` of an algorithm's configuration",
    "training_backends": "`policy.backend: <name>`",
    "generation_backends": "`generation.backend: <name>`",
    "environments": "`environment: <name>`",
    "rewards": "`reward: <name>`",
    "datasets": "`data.train.source: <name>`",
    "launchers": "`cluster.launcher: <name>`",
    "weight_syncs": "`weight_sync: <name>`",
    "loggers": "`logging.loggers: [<name>]`",
    "callbacks": "`fit(callbacks=[<name>])`",
    "sandboxes": "the option of an environment that runs programs",
    "exporters": "its name, by what writes a trained model elsewhere",
    "commands": "`nemo-rl <name>`",
}


def _singular(kind: Kind) -> str:
    """`losses` to `loss`: as in `register_loss`."""
    for ending, singular in (("sses", "ss"), ("boxes", "box"), ("s", "")):
        if kind.name.endswith(ending):
            return kind.name.removesuffix(ending) + singular
    return kind.name


def _contract(kind: Kind, root: Path) -> list[str]:
    path = kind.protocol or _WITHOUT_PROTOCOL.get(kind.name)
    if path is None:
        return ["Any callable; a command is a function whose arguments `typer` turns into options.", ""]
    module_name, _, attribute = path.partition(":")
    module: Module = read_module(root / (module_name.replace(".", "/") + ".py"), module_name)
    intro = [f"`{module_name}.{attribute}`: {markdown(module.doc)}", ""]
    named = sorted(module.classes, key=lambda item: item.name != attribute)
    constants = [f"**`{item.name}`** {markdown(item.doc)}" for item in module.constants if item.name == attribute]
    related = [] if constants else [line for item in named for line in class_markdown(item)]
    return [*intro, *constants, "", *_without_index("\n".join(related).splitlines())]


def _without_index(lines: list[str]) -> list[str]:
    """The API reference has the entries of the index."""
    return [part for line in lines for part in ([line, ":no-index:"] if "{py:" in line[:12] else [line])]


def _page(kind: Kind, root: Path, clauses: dict[str, list[str]]) -> str:
    title = kind.label[0].upper() + kind.label[1:]
    facts = [
        ("Entry-point group", f"`{kind.group}`"),
        ("Decorator", f'`@nemo_rl_core.registry.register_{_singular(kind)}("name")`'),
        ("Version of the contract", str(kind.api_version)),
        ("Chosen by", _CHOSEN_BY[kind.name]),
        ("Packages are named", f"`{kind.package_hint}`"),
    ]
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts), ""]
    kit = ["## Clauses", "", *clauses[kind.name]] if kind.name in clauses else []
    return "\n".join([f"# {title}", "", *table, "## Contract", "", *_contract(kind, root), *kit, ""])


def write_kind_pages(root: Path, folder: Path) -> None:
    """Write `<kind>.md` for every kind, and their index."""
    clauses = clause_sections(root)
    for kind in KINDS.values():
        (folder / f"{kind.name}.md").write_text(_page(kind, root, clauses), encoding="utf-8")
    index = ["# Kinds of components", "", "```{toctree}", ":maxdepth: 1", "", *KINDS, "```", ""]
    (folder / "index.md").write_text("\n".join(index), encoding="utf-8")
