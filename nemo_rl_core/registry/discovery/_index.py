"""Index of entry points, read from metadata once per process; imports nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from nemo_rl_core.registry.discovery._distributions import Distribution, distributions, normalize
from nemo_rl_core.registry.discovery._kinds import API_GROUP, HOOKS_GROUP, KINDS

__all__ = [
    "ALLOW_VARIABLE",
    "CORE",
    "DEBUG_VARIABLE",
    "DENY_VARIABLE",
    "STRICT_VARIABLE",
    "Entry",
    "Index",
    "Selection",
]

CORE = "nemo-rl-core"
ALLOW_VARIABLE = "NEMO_RL_PLUGINS"
DENY_VARIABLE = "NEMO_RL_DISABLE_PLUGINS"
STRICT_VARIABLE = "NEMO_RL_STRICT_PLUGINS"
DEBUG_VARIABLE = "NEMO_RL_DEBUG"

_PREFIX = "nemo_rl."
_NAME = re.compile(r"[^\s:=\[\]]+\Z")
_OBJECT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\Z")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)?\Z")


class Entry(NamedTuple):
    """One entry point, as text."""

    group: str
    name: str
    value: str
    distribution: Distribution
    problem: str | None = None
    """Why it cannot be used, if that is plain from the text."""


class Selection(NamedTuple):
    """Which distributions may provide anything; the core itself always may."""

    allow: frozenset[str] | None = None
    """Canonical names; None allows all."""
    deny: frozenset[str] = frozenset()

    @classmethod
    def from_environment(cls, allow: Iterable[str] | None = None, deny: Iterable[str] | None = None) -> Selection:
        """The given names, or where None those of NEMO_RL_PLUGINS and NEMO_RL_DISABLE_PLUGINS.

        NEMO_RL_PLUGINS set to nothing allows no plugin at all.
        """
        if allow is None and ALLOW_VARIABLE in os.environ:
            allow = os.environ[ALLOW_VARIABLE].split(",")
        if deny is None:
            deny = os.environ.get(DENY_VARIABLE, "").split(",")
        return cls(None if allow is None else _names(allow), _names(deny))

    def refusal(self, distribution: str) -> str | None:
        """Why the distribution is not admitted, or None if it is."""
        if distribution == CORE:
            return None
        if distribution in self.deny:
            return f"disabled (deny list, {DENY_VARIABLE})"
        if self.allow is not None and distribution not in self.allow:
            return f"disabled (not in the allow list, {ALLOW_VARIABLE})"
        return None


def _names(names: Iterable[str]) -> frozenset[str]:
    return frozenset(normalize(name.strip()) for name in names if name.strip())


class Index:
    """All entry points of our groups, by group, in one deterministic order.

    Args:
        selection: Which distributions are admitted; entries of others are kept in `disabled`.
    """

    def __init__(self, selection: Selection) -> None:
        self.entries: dict[str, list[Entry]] = {}
        self.disabled: list[Entry] = []
        self.distributions: dict[str, Distribution] = {}
        self._api: dict[tuple[str, str], str] = {}
        self.unreadable: dict[str, Distribution] = {}
        """Those whose metadata is no text; what they seem to provide has the reason as its problem."""
        for dist in distributions():
            text = dist.read("entry_points.txt")
            if text and _PREFIX in text:
                self._add(dist, text, selection)
        for entries in self.entries.values():
            entries.sort(key=lambda e: (e.name, e.distribution.name))

    def _add(self, dist: Distribution, text: str, selection: Selection) -> None:
        found = list(_parse(dist, text))
        if not found:
            return
        if selection.refusal(dist.name):
            self.disabled += found
            return
        self.distributions[dist.name] = dist
        if dist.problem is not None:
            self.unreadable[dist.name] = dist
            found = [entry._replace(problem=dist.problem) for entry in found]
        for entry in found:
            if entry.group == API_GROUP:
                self._api[dist.name, entry.name] = entry.value
            else:
                self.entries.setdefault(entry.group, []).append(entry)

    def of(self, kind: str) -> list[Entry]:
        """The entries of one kind, by name and then distribution."""
        return self.entries.get(_PREFIX + kind, [])

    def hooks(self) -> list[Entry]:
        """The hook plugins."""
        return self.entries.get(HOOKS_GROUP, [])

    def misplaced(self) -> list[Entry]:
        """Entries of groups that do not exist, such as a misspelled one."""
        known = {kind.group for kind in KINDS.values()} | {HOOKS_GROUP}
        return [e for group in sorted(self.entries) if group not in known for e in self.entries[group]]

    def api_version(self, distribution: str, kind: str) -> str:
        """The version of the kind's contract that the distribution declares, as written; "1" if none."""
        return self._api.get((distribution, kind), "1")


def _parse(dist: Distribution, text: str) -> Iterable[Entry]:
    group, seen = "", set()
    for raw in text.splitlines():
        line = raw.strip()
        if not line or line.startswith(("#", ";")):
            continue
        if line.startswith("["):
            group = line.strip("[]").strip()
            continue
        if not group.startswith(_PREFIX):
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        value = value.partition("[")[0].replace(" ", "")  # extras of old entry points mean nothing here
        problem = _problem(group, name, equals, value, line)
        if (group, name) in seen:
            problem = problem or f"the name stands twice in [{group}] of {dist.name}"
        seen.add((group, name))
        yield Entry(group, name, value, dist, problem)


def _problem(group: str, name: str, equals: str, value: str, line: str) -> str | None:
    if not equals or not _NAME.match(name):
        return f"malformed entry point {line!r}: expected `name = module:attr` (no colon or blank in the name)"
    if group == API_GROUP:
        return None
    if group == HOOKS_GROUP:
        return None if _MODULE.match(value) else f"malformed entry point {line!r}: expected `name = module`"
    kind = group.removeprefix(_PREFIX)
    if kind not in KINDS:
        from difflib import get_close_matches

        close = get_close_matches(kind, KINDS, n=1)
        fix = f"did you mean [{_PREFIX}{close[0]}]?" if close else f"the groups are {_PREFIX}<{', '.join(KINDS)}>"
        return f"there is no entry-point group [{group}]; {fix}"
    if not _OBJECT.match(value):
        return f"malformed entry point {line!r}: the value must be `module:attr`, the component itself"
    return None
