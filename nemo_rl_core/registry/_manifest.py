"""Which components a run uses, exactly: written into checkpoints, compared on resume and in workers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

from nemo_rl_core._errors import PluginIncompatible
from nemo_rl_core.registry._source import source_hash

if TYPE_CHECKING:
    from nemo_rl_core.registry._reference import ComponentRef
    from nemo_rl_core.registry._registry import Registry

__all__ = [
    "ManifestDifference",
    "check_manifest",
    "compare_manifests",
    "compare_with_installed",
    "difference_table",
    "manifest",
    "manifest_row",
]

_COMPARED = ("distribution", "version", "value", "api_version", "source_hash")


@frozen
class ManifestDifference:
    """One fact that two manifests do not share."""

    kind: str
    name: str
    field: str
    """Column of the manifest, or "component" when only one side has it."""
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}: {self.field} was {self.before}, is {self.after}"


def manifest_row(ref: ComponentRef) -> dict[str, Any]:
    """The manifest's row of one component: plain strings and numbers, fit for JSON."""
    return {
        "kind": ref.kind,
        "name": ref.name,
        "distribution": ref.distribution,
        "version": ref.version,
        "value": ref.value,
        "api_version": ref.api_version,
        "source_hash": ref.source_hash,
    }


def manifest(refs: Iterable[ComponentRef]) -> list[dict[str, Any]]:
    """One row per component, ordered by kind and name, each component once."""
    rows = {(ref.kind, ref.name, ref.qualified_name): ref for ref in refs}
    return [manifest_row(rows[key]) for key in sorted(rows)]


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
    rows = [head, *((d.kind, d.name, d.field, str(d.before), str(d.after)) for d in differences)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _row_here(row: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    """The row of the same component as this process has it."""
    here, distribution, value = dict(row), row["distribution"], row["value"]
    installed = registry.distribution(distribution) if distribution else None
    if distribution:
        here["distribution"] = installed.name if installed else None
        here["version"] = installed.version if installed else None
    same_place = distribution is None or installed is not None
    if row.get("source_hash") and value and same_place and value.partition(":")[0] not in ("__main__", "__mp_main__"):
        here["source_hash"] = source_hash(value, whole_package=distribution is not None)
    return here


def check_manifest(rows: Sequence[Mapping[str, Any]], registry: Registry) -> None:
    """Compare the rows of another process with what is installed here, importing no plugin.

    Raises:
        PluginIncompatible: Something differs; the message holds a table of all differences.
    """
    differences = compare_manifests(rows, [_row_here(row, registry) for row in rows])
    if differences:
        raise PluginIncompatible(
            "This process has other plugins than the process that sent them:\n"
            f"{difference_table(differences, before='sent', after='here')}\n"
            "Install the same versions on every machine."
        )


def compare_with_installed(ref: ComponentRef, expected_hash: str | None) -> None:
    """In a worker: compare one reference sent by the driver with what is installed here.

    Raises:
        PluginIncompatible: Another version or source, or none; the message holds a table.
    """
    from nemo_rl_core.registry._registry import get_registry

    row = {**manifest_row(ref), "source_hash": expected_hash}
    check_manifest([row], get_registry())
