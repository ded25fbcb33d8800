"""Messages for a name that does not lead to one component."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_rl_core.errors import PluginConflict, PluginNotFound
from nemo_rl_core.registry.discovery._kinds import Kind

if TYPE_CHECKING:
    from nemo_rl_core.registry._reference import ComponentRef
    from nemo_rl_core.registry.discovery._index import Entry

__all__ = ["conflict", "known_package", "known_packages", "not_found"]

_SHOWN_OF_FAMILY = 3


def known_package(kind: str, name: str) -> str | None:
    """The published distribution that provides a name, from the table shipped with the core."""
    return _known().get(kind, {}).get(name)


def known_packages() -> frozenset[str]:
    """Every distribution of that table: those of this project."""
    return frozenset(package for names in _known().values() for package in names.values())


def _known() -> dict[str, dict[str, str]]:
    import json  # only an error or the start of a run needs it

    text = Path(__file__).with_name("known_plugins.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, str]] = json.loads(text)
    return table


def _listing(names: Iterable[str]) -> str:
    """The names; a family with many members, such as `reasoning_gym/...`, is one entry."""
    families: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        families.setdefault(name.partition("/")[0], []).append(name)
    shown: list[str] = []
    for family, members in families.items():
        inner = [name for name in members if name != family]
        if len(inner) <= _SHOWN_OF_FAMILY:
            shown += members
        else:
            shown += [name for name in members if name == family]
            shown.append(f"{family}/... ({len(inner)}, such as {inner[0]})")
    return ", ".join(shown) or "none"


def not_found(
    kind: Kind, name: str, installed: Sequence[str], disabled: Sequence[tuple[Entry, str]] = ()
) -> PluginNotFound:
    """No component of that name: what is installed, and how to get the one asked for.

    Args:
        kind: The kind asked for.
        name: As the user wrote it.
        installed: Names of this kind that can be used.
        disabled: Entries of that name whose distribution is not admitted, each with the reason.
    """
    if disabled:
        entry, reason = disabled[0]
        return PluginNotFound(
            f"`{name}` is provided by {entry.distribution.name} {entry.distribution.version}, which is {reason}."
        )
    package = known_package(kind.name, name)
    if package is not None:
        return PluginNotFound(f"`{name}` is provided by {package}, which is not installed: pip install {package}")
    close = get_close_matches(name, installed, n=1)
    fix = (
        f"Did you mean {close[0]!r}?"
        if close
        else f"Install the package that provides it (such packages are usually named {kind.package_hint}), "
        "or give `module:attr` or the object itself."
    )
    return PluginNotFound(f"No {kind.label} named {name!r}. Installed: {_listing(installed)}. {fix}")


def conflict(kind: Kind, name: str, candidates: Sequence[ComponentRef]) -> PluginConflict:
    """Two or more components of one bare name: who they are and the line that settles it."""
    lines = [f"The {kind.label} {name!r} is provided by {len(candidates)}:"]
    for ref in candidates:
        provider = f"{ref.distribution} {ref.version}" if ref.distribution else ref.origin
        lines.append(f"  {ref.qualified_name}  ({provider}, {ref.value})")
    choice = candidates[0].qualified_name
    lines.append(f"Choose one by its full name, or settle it in the configuration: plugins: {{{name}: {choice!r}}}")
    if any(ref.origin == "decorator" for ref in candidates):
        lines.append("A decorator may also replace an installed name on purpose: override=True.")
    return PluginConflict("\n".join(lines))
