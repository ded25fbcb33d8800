"""Compatibility of a distribution with this core, read from its metadata before any import."""

from __future__ import annotations

import re

from nemo_rl_core._version import __version__ as CORE_VERSION
from nemo_rl_core.registry.discovery._distributions import Distribution, normalize
from nemo_rl_core.registry.discovery._index import CORE, Index
from nemo_rl_core.registry.discovery._kinds import KINDS

__all__ = ["incompatibility"]

_checked: dict[tuple[str, str, str], str | None] = {}


def incompatibility(index: Index, dist: Distribution, kind: str | None) -> str | None:
    """Why the distribution does not fit this core, and what to do; None if it does.

    Args:
        index: Holds the declared API versions.
        dist: The distribution.
        kind: Also compare the API version of this kind; None for hook plugins.
    """
    key = (dist.name, dist.version, dist.location)
    if key not in _checked:
        _checked[key] = None if dist.name == CORE else _core_requirement(dist)
    return _checked[key] or (kind and _api(index, dist, kind)) or None


def _core_requirement(dist: Distribution) -> str | None:
    """The requirement on the core that this core does not meet."""
    for line in dist.requires:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if name is None or normalize(name.group()) != CORE:
            continue
        if _plainly_met(line[name.end() :]):
            continue
        from packaging.requirements import InvalidRequirement, Requirement

        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            return f"its requirement {line!r} cannot be read"
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and not requirement.specifier.contains(CORE_VERSION, prereleases=True):
            return (
                f"it requires {CORE}{requirement.specifier}, and {CORE} {CORE_VERSION} is installed. "
                f"Install versions that fit: pip install -U {CORE} {dist.name}"
            )
    return None


def _plainly_met(specifier: str) -> bool:
    """Whether `>=0.1,<0.2` and the like hold, told without `packaging`, which takes long to import.

    False only means that `packaging` has to decide.
    """
    clauses = [clause.strip(" ()") for clause in specifier.split(",")]
    matches = [re.fullmatch(r"(>=|<)\s*(\d+(?:\.\d+)*)", clause) for clause in clauses]
    if not all(matches) or not re.fullmatch(r"\d+(\.\d+)*", CORE_VERSION):
        return False
    ours = _release(CORE_VERSION)
    bounds = [(m.group(1), _release(m.group(2))) for m in matches if m is not None]
    return all(ours >= bound if operator == ">=" else ours < bound for operator, bound in bounds)


def _release(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in version.split(".")]
    while numbers and numbers[-1] == 0:  # 1.0 and 1 are equal
        numbers.pop()
    return tuple(numbers)


def _api(index: Index, dist: Distribution, kind: str) -> str | None:
    declared, ours = index.api_version(dist.name, kind), KINDS[kind].api_version
    match = re.fullmatch(r"v?(\d+)", declared)
    if match is None:
        return f"it declares API version {declared!r} of {kind} in [nemo_rl.api]; expected such as `{kind} = v{ours}`"
    if int(match.group(1)) == ours:
        return None
    newer = int(match.group(1)) > ours
    fix = f"upgrade the core: pip install -U {CORE}" if newer else f"upgrade the plugin: pip install -U {dist.name}"
    return (
        f"it is written for API version {match.group(1)} of {kind}, and {CORE} {CORE_VERSION} has version {ours}; {fix}"
    )
