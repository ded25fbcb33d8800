"""Manifest of a run's components: shown at its start, written into checkpoints, compared on resume."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from attrs import frozen

from nemo_rl_core.errors import PluginIncompatible
from nemo_rl_core.registry.discovery._source import source_file, source_hash

if TYPE_CHECKING:
    from nemo_rl_core.registry._hook_plugin import HookPlugin
    from nemo_rl_core.registry._reference import ComponentRef

__all__ = [
    "ManifestDifference",
    "active_table",
    "aligned",
    "compare_manifests",
    "difference_table",
    "hook_row",
    "is_first_party",
    "manifest",
    "report_changes",
]

_COMPARED = ("distribution", "version", "value", "api_version", "source_hash")


@frozen
class ManifestDifference:
    """One fact that two manifests do not share."""

    kind: str
    name: str
    field: str
    """Column of the manifest, or "component" when only one side has it."""
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}: {self.field} was {self.before}, is {self.after}"


def hook_row(plugin: HookPlugin) -> dict[str, Any]:
    """The row of a listener: an installed hook plugin (kind "hooks") or a callback of the run."""
    listener, dist = plugin.listener, plugin.distribution
    code = listener if inspect.ismodule(listener) or isinstance(listener, type) else type(listener)
    value = code.__name__ if inspect.ismodule(code) else f"{code.__module__}:{code.__qualname__}"
    hashed = dist is None or dist.editable
    return {
        "kind": "callbacks" if plugin.is_callback else "hooks",
        "name": plugin.name or value.rpartition(":")[2],
        "distribution": dist.name if dist else None,
        "version": dist.version if dist else None,
        "value": value,
        "api_version": 1,
        "source_hash": source_hash(value, whole_package=dist is not None, component=code) if hashed else None,
        "origin": "entry point" if dist else "object",
        "defined_in": None if dist else source_file(code),
    }


def manifest(refs: Iterable[ComponentRef], hooks: Iterable[HookPlugin] = ()) -> list[dict[str, Any]]:
    """One row per component and listener, ordered by kind and name, each once."""
    rows = {(ref.kind, ref.name, ref.qualified_name): ref for ref in refs}
    found = [rows[key].manifest_row for key in sorted(rows)]
    known = {(row["kind"], row["value"]) for row in found}
    listeners = [row for row in map(hook_row, hooks) if (row["kind"], row["value"]) not in known]
    return found + sorted(listeners, key=lambda row: (row["kind"], row["name"], row["value"]))


# -- the table at the start of a run -------------------------------------------------------------------------


@cache
def _our_distributions() -> frozenset[str]:
    from nemo_rl_core.registry._messages import known_packages
    from nemo_rl_core.registry.discovery._index import CORE

    return frozenset({CORE, *known_packages()})


def is_first_party(distribution: str | None) -> bool:
    """Whether a distribution is one of this project's own; user code (None) is not."""
    return distribution in _our_distributions()


def active_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a run is made of, as text; `*` marks plugins of others, `+` code of the user's own."""
    cells = []
    for row in rows:
        mark = "+" if not row["distribution"] else " " if is_first_party(row["distribution"]) else "*"
        provider = f"{row['distribution']} {row['version']}" if row["distribution"] else "own code"
        source = f"source {row['source_hash']}" if row.get("source_hash") else ""
        cells.append((f"{mark} {row['kind']}", row["name"], provider, str(row["value"] or "-"), source))
    marks = {line[0][0] for line in cells}
    legend = [text for mark, text in (("*", "* third-party plugin"), ("+", "+ your own code")) if mark in marks]
    return "\n".join([f"Plugins of this run:{'  ' if legend else ''}{', '.join(legend)}", *aligned(cells)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text with the cells of each column under each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


# -- comparing -------------------------------------------------------------------------------------------------


def compare_manifests(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> list[ManifestDifference]:
    """What changed from one manifest to another; empty if nothing did.

    Columns that one side does not have (an older manifest) are not compared.
    """
    old, new = ({(row["kind"], row["name"]): row for row in rows} for rows in (before, after))
    found = []
    for kind, name in sorted(old.keys() | new.keys()):
        a, b = old.get((kind, name)), new.get((kind, name))
        if a is None or b is None:
            words = ("absent", "present") if a is None else ("present", "absent")
            found.append(ManifestDifference(kind, name, "component", *words))
            continue
        for column in _COMPARED:
            if column in a and column in b and a[column] != b[column]:
                found.append(ManifestDifference(kind, name, column, a[column], b[column]))
    return found


def difference_table(differences: Sequence[ManifestDifference], *, before: str = "before", after: str = "after") -> str:
    """The differences as an aligned table of text, with these headings over the two sides."""
    head = ("kind", "name", "what", before, after)
    return "\n".join(aligned([head, *((d.kind, d.name, d.field, str(d.before), str(d.after)) for d in differences)]))


def report_changes(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], *, where: str) -> str | None:
    """What changed since a checkpoint was written, as a table; None if nothing did.

    Args:
        before: The manifest in the checkpoint.
        now: The manifest of this run.
        where: The checkpoint, for the message.

    Raises:
        PluginIncompatible: A component has another API version: its state may not mean what it meant.
    """
    differences = compare_manifests(before, now)
    table = difference_table(differences, before="checkpoint", after="now")
    broken = [d for d in differences if d.field == "api_version"]
    if broken:
        named = ", ".join(sorted({f"{d.kind} {d.name!r}" for d in broken}))
        old = sorted({f"{r['distribution']}=={r['version']}" for r in before if r.get("distribution")})
        raise PluginIncompatible(
            f"{where} was written with another API version of {named}, so it cannot be continued:\n{table}\n"
            f"Install what wrote it (pip install {' '.join(old)}), or start anew with another run_dir or "
            "checkpointing.resume=never."
        )
    return f"Since {where} was written, plugins have changed:\n{table}" if differences else None
