"""Comparison of a process's plugins with those that another one expects; imports no plugin."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

from nemo_rl_core.errors import PluginIncompatible
from nemo_rl_core.registry._manifest import aligned
from nemo_rl_core.registry.discovery._kinds import KINDS
from nemo_rl_core.registry.discovery._source import source_hash

if TYPE_CHECKING:
    from nemo_rl_core.registry._current import Lookup

__all__ = [
    "NodeDifference",
    "check_nodes",
    "node_differences",
    "node_name",
    "node_table",
    "row_here",
    "worker_rows",
]

_MAIN = ("__main__", "__mp_main__")


@frozen
class NodeDifference:
    """One plugin that a node does not have as it is expected."""

    node: str
    """Host name, and the rank of a worker."""
    plugin: str
    """Distribution (or user code) and the components in question."""
    found: str
    expected: str


def node_name() -> str:
    """This process as tables call it: the host, and the rank if it is a worker (`RANK` is set)."""
    import socket

    rank = os.environ.get("RANK")
    return socket.gethostname() + (f" rank {rank}" if rank is not None else "")


def worker_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a manifest that a worker must agree with: those of installed distributions.

    User code travels with what is sent, or is compared when it is loaded.
    """
    return [dict(row) for row in rows if row.get("distribution")]


def row_here(row: Mapping[str, Any], registry: Lookup) -> dict[str, Any]:
    """The row of the same component as this process has it."""
    here, distribution, value = dict(row), row["distribution"], row["value"]
    if row["kind"] in KINDS:
        here["api_version"] = KINDS[row["kind"]].api_version
    installed = registry.distribution(distribution) if distribution else None
    if distribution:
        here["distribution"] = installed.name if installed else None
        here["version"] = installed.version if installed else None
    if installed is not None and row.get("origin", "entry point") == "entry point":
        values = [
            e.value for e in registry.index.of(row["kind"]) if e.distribution is installed and e.name == row["name"]
        ]
        here["value"] = values[0] if values else value
    same_place = distribution is None or installed is not None
    if row.get("source_hash") and value and same_place and value.partition(":")[0] not in _MAIN:
        here["source_hash"] = source_hash(value, whole_package=distribution is not None)
    return here


def node_differences(
    rows: Sequence[Mapping[str, Any]], registry: Lookup, *, node: str | None = None
) -> list[NodeDifference]:
    """Compare rows of a manifest with what this process has.

    Components of one distribution that differ in the same way share a line.

    Args:
        rows: Of the process that sent them.
        registry: Of this process.
        node: How the table calls this process; None is `node_name()`.
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        difference = _difference(row, row_here(row, registry))
        if difference is not None:
            found.setdefault((row["distribution"] or "own code", *difference), []).append(
                f"{row['kind']} {row['name']}"
            )
    name = (node_name() if node is None else node) if found else ""
    return [
        NodeDifference(name, f"{provider} ({', '.join(components)})", here, expected)
        for (provider, here, expected), components in found.items()
    ]


def _difference(sent: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, str] | None:
    """(found, expected) in words, of the first fact that differs; None if all agree."""
    if here["distribution"] != sent["distribution"]:
        return "not installed", str(sent["version"])
    if here["version"] != sent["version"]:
        return str(here["version"]), str(sent["version"])
    for column, word in (("api_version", "API version"), ("value", "entry point"), ("source_hash", "source")):
        if column in sent and here.get(column) != sent[column]:
            version = f"{sent['version']}, " if sent["version"] else ""
            found = "none" if here.get(column) is None else here[column]
            return f"{version}{word} {found}", f"{version}{word} {sent[column]}"
    return None


def node_table(differences: Sequence[NodeDifference]) -> str:
    """An aligned table with the columns node, plugin, found, expected."""
    head = ("node", "plugin", "found", "expected")
    return "\n".join(aligned([head, *((d.node, d.plugin, d.found, d.expected) for d in differences)]))


def check_nodes(differences: Sequence[NodeDifference]) -> None:
    """Refuse to go on with nodes that differ.

    Raises:
        PluginIncompatible: There is a difference; the message holds the table and what to install.
    """
    if not differences:
        return
    nodes = len({d.node for d in differences})
    raise PluginIncompatible(
        f"{nodes} worker process{'es have' if nodes > 1 else ' has'} other plugins than the driver:\n"
        f"{node_table(differences)}\n"
        "Install on every machine what the driver has (`nemo-rl plugins list` shows it), in the same versions; then "
        "start the run again."
    )
