"""Problems of the installed plugins, and how to fix them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from attrs import evolve, frozen

from nemo_rl_core.errors import PluginBroken, PluginError, PluginIncompatible
from nemo_rl_core.registry._manifest import manifest
from nemo_rl_core.registry._verification import NodeDifference
from nemo_rl_core.registry.discovery._distributions import Distribution, distributions, normalize
from nemo_rl_core.registry.discovery._index import CORE, DENY_VARIABLE
from nemo_rl_core.registry.discovery._kinds import KINDS
from nemo_rl_core.registry.explaining._probe import Answer, Probe, probe

if TYPE_CHECKING:
    from nemo_rl_core.registry._reference import ComponentRef
    from nemo_rl_core.registry._registry import Registry

__all__ = ["Diagnosis", "Finding", "compare_nodes", "diagnose", "examine", "read_nodes", "reported_nodes"]

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


@frozen
class Diagnosis:
    """What was found."""

    findings: list[Finding]
    nodes: Mapping[str, Sequence[Mapping[str, Any]]]
    """What launcher plugins report of their nodes."""


def diagnose(registry: Registry, *, load: bool = True) -> list[Finding]:
    """Every fault of the installed plugins; see `examine`."""
    return examine(registry, load=load).findings


def examine(registry: Registry, *, load: bool = True, timeout_s: float = 60.0) -> Diagnosis:
    """Look for every fault of the installed plugins, and ask them for their nodes.

    Args:
        registry: Of this process.
        load: Also import every component and every hook plugin, in a child process; without it only metadata is read.
        timeout_s: Longest time that one of them may take to be imported.
    """
    found = [*_unreadable(registry), *_misplaced(registry), *_conflicts(registry), *_requirements(registry)]
    found += _by_metadata(registry)
    if not load:
        return Diagnosis(found, {})
    probes = _to_import(registry)
    answers = probe(registry, probes, timeout_s=timeout_s)
    found += [_finding(registry, which, answer) for which, answer in zip(probes, answers, strict=True) if answer.error]
    return Diagnosis(found, {name: rows for answer in answers for name, rows in answer.nodes.items()})


def _unreadable(registry: Registry) -> Iterator[Finding]:
    for name, dist in registry.index.unreadable.items():
        fix = f"pip install --force-reinstall {name}, or {_disable(registry, name)}"
        yield Finding("broken", f"{name} {dist.version}", str(dist.problem), fix)


def _misplaced(registry: Registry) -> Iterator[Finding]:
    for entry in registry.index.misplaced():
        dist = entry.distribution
        if dist.name not in registry.index.unreadable:
            yield Finding(
                "misplaced",
                f"{dist.name} {dist.version}",
                f"{entry.name} = {entry.value}: {entry.problem}",
                f"correct the group in the pyproject.toml of {dist.name} and install it again",
            )


def _conflicts(registry: Registry) -> Iterator[Finding]:
    from nemo_rl_core.registry._messages import conflict

    for kind in KINDS.values():
        by_name: dict[str, list[ComponentRef]] = {}
        for ref in registry.entries(kind.name):
            by_name.setdefault(ref.name, []).append(ref)
        for name, refs in by_name.items():
            if len(refs) > 1:
                lines = str(conflict(kind, name, refs)).splitlines()
                told = " ".join(line.strip() for line in lines[: len(refs) + 1])
                yield Finding("conflict", f"{kind.label} {name}", told, _choice(registry, name, refs))


def _choice(registry: Registry, name: str, refs: Sequence[ComponentRef]) -> str:
    """How to settle between several of one name: by a full name that only one has, or by disabling the others."""
    kept = next((ref for ref in refs if ref.distribution == CORE), refs[0])
    full = [ref.qualified_name for ref in refs]
    named = [ref for ref in refs if full.count(ref.qualified_name) == 1]
    wanted = next((ref for ref in named if ref is not kept or kept.distribution != CORE), None)
    others = {ref.distribution for ref in refs if ref.distribution not in (None, CORE, kept.distribution)}
    ways = []
    if wanted is not None:
        ways.append(f"put `plugins: {{{name}: {wanted.qualified_name!r}}}` into the configuration")
    if others:
        ways.append(_disable(registry, *sorted(map(str, others))))
    return ", or ".join(ways) or f"correct the entry points of {refs[0].distribution} and install it again"


def _by_metadata(registry: Registry) -> Iterator[Finding]:
    """What can be told without importing a plugin."""
    for ref in registry.entries():
        if ref.distribution in registry.index.unreadable:
            continue
        try:
            ref.check() if ref.origin == "entry point" else ref.load()  # user code has been imported already
        except PluginError as error:
            yield _of_error(
                registry, ref.qualified_name, error, ref.distribution, isinstance(error, PluginIncompatible)
            )


def _to_import(registry: Registry) -> list[Probe]:
    """What the metadata finds no fault with: by distribution, hook plugins too."""
    found = [
        Probe(ref.kind, str(ref.distribution), ref.name, str(ref.value))
        for ref in registry.entries()
        if ref.origin == "entry point" and ref.state != "broken"
    ]
    found += [
        Probe("hooks", entry.distribution.name, entry.name, entry.value)
        for entry in registry.index.hooks()
        if entry.distribution.name not in registry.index.unreadable
    ]
    return sorted(found, key=lambda each: each.distribution)


def _finding(registry: Registry, which: Probe, answer: Answer) -> Finding:
    subject = f"{which.distribution}:{which.name}"
    found = _of_error(registry, subject, answer.error, which.distribution, answer.incompatible)
    return evolve(found, problem="hook plugin") if which.kind == "hooks" and not answer.incompatible else found


def _of_error(registry: Registry, subject: str, error: object, distribution: str | None, incompatible: bool) -> Finding:
    """A component that is broken or does not fit, with what helps: nobody can disable the core or user code."""
    if distribution is None:
        fix = "correct that code"
    elif distribution == CORE:
        fix = f"pip install --force-reinstall {CORE}"
    else:
        upgrade = f"{CORE} {distribution}" if incompatible else distribution
        fix = f"pip install -U {upgrade}, or {_disable(registry, distribution)}"
    return Finding("incompatible" if incompatible else "broken", subject, str(error), fix)


def _disable(registry: Registry, *distributions: str) -> str:
    """How to disable these, and what is disabled already."""
    names = sorted({*registry._selection.deny, *distributions})
    return f"disable {'it' if len(distributions) == 1 else 'them'}: {DENY_VARIABLE}={','.join(names)}"


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
