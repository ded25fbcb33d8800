"""Problems of the installed plugins, and how to fix them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from attrs import frozen

from nemo_rl_core.errors import PluginBroken, PluginError, PluginIncompatible
from nemo_rl_core.registry._manifest import manifest
from nemo_rl_core.registry._verification import NodeDifference
from nemo_rl_core.registry.discovery._distributions import Distribution, distributions, normalize
from nemo_rl_core.registry.discovery._index import CORE, DENY_VARIABLE
from nemo_rl_core.registry.discovery._kinds import KINDS

if TYPE_CHECKING:
    from nemo_rl_core.registry._registry import Registry

__all__ = ["Finding", "compare_nodes", "diagnose", "read_nodes", "reported_nodes"]

Problem = Literal[
    "broken", "conflict", "incompatible", "misplaced", "missing requirement", "missing extra", "hook plugin", "node"
]


@frozen
class Finding:
    """One thing that is wrong, or worth knowing."""

    problem: Problem
    subject: str
    """The distribution or component in question."""
    message: str
    fix: str
    severity: Literal["error", "note"] = "error"
    """A note is no fault: something optional is not installed."""


def diagnose(registry: Registry, *, load: bool = True) -> list[Finding]:
    """Every fault of the installed plugins.

    Args:
        registry: Of this process.
        load: Also import every component and every hook plugin; without it only metadata is read.
    """
    found = [*_misplaced(registry), *_conflicts(registry), *_requirements(registry)]
    found += _components(registry, load=load)
    if load:
        found += _hooks(registry)
    return found


def _misplaced(registry: Registry) -> Iterator[Finding]:
    for entry in registry.index.misplaced():
        dist = entry.distribution
        yield Finding(
            "misplaced",
            f"{dist.name} {dist.version}",
            f"{entry.name} = {entry.value}: {entry.problem}",
            f"correct the group in the pyproject.toml of {dist.name} and install it again",
        )


def _conflicts(registry: Registry) -> Iterator[Finding]:
    from nemo_rl_core.registry._messages import conflict

    for kind in KINDS.values():
        by_name: dict[str, list[Any]] = {}
        for ref in registry.entries(kind.name):
            by_name.setdefault(ref.name, []).append(ref)
        for name, refs in by_name.items():
            if len(refs) > 1:
                lines = str(conflict(kind, name, refs)).splitlines()
                yield Finding(
                    "conflict",
                    f"{kind.label} {name}",
                    " ".join(line.strip() for line in lines[: len(refs) + 1]),
                    f"use a full name, put `plugins: {{{name}: {refs[0].qualified_name!r}}}` into the configuration, "
                    f"or disable one: {DENY_VARIABLE}={refs[-1].distribution or '<distribution>'}",
                )


def _components(registry: Registry, *, load: bool) -> Iterator[Finding]:
    for ref in registry.entries():
        try:
            ref.load() if load else ref.check()
        except PluginIncompatible as error:
            yield Finding("incompatible", ref.qualified_name, str(error), f"pip install -U {CORE} {ref.distribution}")
        except PluginError as error:
            yield Finding(
                "broken",
                ref.qualified_name,
                str(error),
                f"pip install -U {ref.distribution}, or disable it: {DENY_VARIABLE}={ref.distribution}",
            )


def _hooks(registry: Registry) -> Iterator[Finding]:
    """Hook plugins that cannot be imported or are malformed, and provision hooks that raise."""
    from nemo_rl_core.registry._hooks import HookPlugins

    for entry in registry.index.hooks():
        dist = entry.distribution
        disable = f"repair it (pip install -U {dist.name}), or disable it: {DENY_VARIABLE}={dist.name}"
        try:
            plugins = HookPlugins.of(registry, entry)
        except PluginError as error:
            kind: Problem = "incompatible" if isinstance(error, PluginIncompatible) else "hook plugin"
            yield Finding(kind, f"{dist.name}:{entry.name}", str(error), disable)
            continue
        for each in KINDS:
            list(plugins.call_each(f"nemo_rl_{each}"))
        for failure in plugins.failures:
            error_text = f"{failure.hook} raised {type(failure.error).__name__}: {failure.error}"
            yield Finding("hook plugin", f"{dist.name}:{entry.name}", error_text, disable)


# -- what distributions require ------------------------------------------------------------------------------


def _requirements(registry: Registry) -> Iterator[Finding]:
    installed = {dist.name: dist.version for dist in distributions()}
    for dist in registry.index.distributions.values():
        yield from _missing_of(dist, installed)


def _missing_of(dist: Distribution, installed: Mapping[str, str]) -> Iterator[Finding]:
    extras: dict[str, list[str]] = {}
    for line in dist.requires:
        lacking = _lacking(line, installed, extra="")
        if lacking is not None and normalize(_name(line)) != CORE:  # the core's version is checked as compatibility
            yield Finding(
                "missing requirement",
                f"{dist.name} {dist.version}",
                f"it requires {lacking}",
                f"pip install {_quoted(_without_marker(line))}",
            )
        for extra in re.findall(r"extra\s*==\s*['\"]([^'\"]+)['\"]", line):
            lacking = _lacking(line, installed, extra=extra)
            if lacking is not None:
                extras.setdefault(extra, []).append(lacking)
    for extra, lacking_of in extras.items():
        yield Finding(
            "missing extra",
            f"{dist.name}[{extra}]",
            f"its optional part {extra!r} is not installed: it needs {', '.join(lacking_of)}",
            f"pip install '{dist.name}[{extra}]', if you want to use it",
            severity="note",
        )


def _lacking(line: str, installed: Mapping[str, str], *, extra: str) -> str | None:
    """The requirement with what was found instead, or None if it is met or does not apply."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        requirement = Requirement(line)
    except InvalidRequirement:
        return f"{line!r}, which cannot be read"
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
        return None
    version = installed.get(normalize(requirement.name))
    wanted = f"{requirement.name}{requirement.specifier}"
    if version is None:
        return f"{wanted} (not installed)"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{wanted} (found {version})"
    return None


def _name(line: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", line)
    return match.group() if match else line


def _without_marker(line: str) -> str:
    return line.partition(";")[0].strip()


def _quoted(requirement: str) -> str:
    return f"'{requirement}'" if re.search(r"[<>\[ ]", requirement) else requirement


# -- other machines ------------------------------------------------------------------------------------------


def compare_nodes(registry: Registry, nodes: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[NodeDifference]:
    """How other machines differ from this one.

    Args:
        registry: Of this process; what it has is what is expected.
        nodes: Node name to its rows: what `nemo-rl plugins list --json` prints there (then what it lacks is
            reported too), or the manifest of a run.
    """
    ours = manifest(registry.entries())
    return [difference for node, rows in nodes.items() for difference in _compare(node, rows, ours)]


def _compare(node: str, theirs: Sequence[Mapping[str, Any]], ours: list[dict[str, Any]]) -> Iterator[NodeDifference]:
    listing = any("state" in row for row in theirs)
    disabled = {row.get("distribution") for row in theirs if row.get("state") == "disabled"}
    theirs = [row for row in theirs if row.get("state") != "disabled"]
    there, here = _by_distribution(theirs), _by_distribution(ours)
    for name in sorted(there.keys() | (here.keys() if listing else set())):
        if name not in here:
            yield NodeDifference(node, name, there[name]["version"], "not installed")
        elif name not in there:
            found = "disabled" if name in disabled else "not installed"
            yield NodeDifference(node, name, found, here[name]["version"])
        elif there[name]["version"] != here[name]["version"]:
            yield NodeDifference(node, name, there[name]["version"], here[name]["version"])
        else:
            yield from _components_differ(node, name, theirs, ours)


def _by_distribution(rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {row["distribution"]: row for row in rows if row.get("distribution") and row["kind"] in KINDS}


def _components_differ(
    node: str, distribution: str, theirs: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]
) -> Iterator[NodeDifference]:
    """Same version, other code: an editable install, or a core with another API version of the kind."""
    mine = {(row["kind"], row["name"]): row for row in ours if row["distribution"] == distribution}
    columns: tuple[tuple[str, Callable[[Any], str]], ...] = (
        ("api_version", lambda v: f"API version {v}"),
        ("value", lambda v: f"entry point {v}"),
        ("source_hash", lambda v: f"source {v}"),
    )
    for row in theirs:
        own = mine.get((row["kind"], row["name"]))
        if row.get("distribution") != distribution or own is None:
            continue
        for column, words in columns:
            if column in row and row[column] is not None and row[column] != own[column]:
                plugin = f"{distribution} ({row['kind']} {row['name']})"
                yield NodeDifference(node, plugin, words(row[column]), words(own[column]))
                break


def reported_nodes(registry: Registry) -> dict[str, Sequence[Mapping[str, Any]]]:
    """What launcher plugins report of their nodes, by the hook `nemo_rl_node_manifests`."""
    found: dict[str, Sequence[Mapping[str, Any]]] = {}
    for _, nodes in registry.hooks.call_each("nemo_rl_node_manifests"):
        found.update(nodes)
    return found


def read_nodes(paths: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """Node name (the file's, without suffix) to the rows in each JSON file.

    Raises:
        PluginBroken: A file cannot be read, or holds something else.
    """
    import json
    from pathlib import Path

    found = {}
    for path in map(Path, paths):
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PluginBroken(f"{path} cannot be read as JSON: {error}.") from error
        if not isinstance(rows, list) or not all(isinstance(r, dict) and {"kind", "name"} <= r.keys() for r in rows):
            raise PluginBroken(
                f"{path} is no list of plugins. Expected what `nemo-rl plugins list --json` prints on the other "
                "machine, or the manifest.json of a run's folder."
            )
        found[path.stem] = rows
    return found
