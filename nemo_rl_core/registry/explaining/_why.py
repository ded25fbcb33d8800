"""Trace of how a name is resolved: the places looked at, what each had, and which one won."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import define, field, frozen

from nemo_rl_core.errors import PluginError
from nemo_rl_core.registry._messages import known_package
from nemo_rl_core.registry.discovery._kinds import KINDS, Kind

if TYPE_CHECKING:
    from nemo_rl_core.registry._reference import ComponentRef
    from nemo_rl_core.registry._registry import Registry
    from nemo_rl_core.registry.discovery._index import Entry

__all__ = ["Resolution", "Step", "kinds_with", "resolution"]


@frozen
class Step:
    """One place that was looked at."""

    place: str
    found: str
    """What is there, in words."""
    decides: bool = False
    """The name was settled here."""


@define
class Resolution:
    """How one name of one kind was resolved."""

    kind: str
    name: str
    steps: list[Step] = field(factory=list)
    winner: ComponentRef | None = None
    error: PluginError | None = None
    """What `Registry.resolve` raises for this name."""

    @property
    def reason(self) -> str:
        """Why it is this component, or the exact error."""
        if self.error is not None:
            return str(self.error)
        deciding = next((step for step in self.steps if step.decides), None)
        return f"{deciding.place}: {deciding.found}" if deciding else "the only component of that name"


def resolution(registry: Registry, kind: str, name: str, *, plugins: Mapping[str, str] | None = None) -> Resolution:
    """Resolve a name as `Registry.resolve` does, keeping a record of every place.

    Args:
        registry: Where to look. Hook plugins are imported if the name is in no metadata; the component is not.
        kind: Plural name of the kind.
        name: `name`, `dist:name` or `module:attr`.
        plugins: The override lines of a configuration (its `plugins` section).
    """
    found = Resolution(kind, name)
    which = registry._kind(kind)
    try:
        found.winner = registry.resolve(kind, name, plugins=plugins)
    except PluginError as error:
        found.error = error
    if ":" in name:
        found.steps = _qualified_steps(registry, which, name, found.winner)
    else:
        found.steps = _bare_steps(registry, which, name, {**registry._preferences, **(plugins or {})}, found.winner)
    return found


def kinds_with(registry: Registry, name: str) -> list[str]:
    """Kinds in which a name (bare, or `dist:name`) is known anywhere: installed, disabled, registered or published.

    Hook plugins are asked only if nothing else knows it.
    """
    bare = name.rpartition(":")[2]
    refs = {ref.kind for ref in registry.entries() if name in (ref.name, ref.qualified_name)}
    disabled = {e.group.removeprefix("nemo_rl.") for e in registry.index.disabled if e.name == bare}
    published = {kind for kind in KINDS if known_package(kind, name)}
    if not refs | disabled | published:
        refs = {ref.kind for ref in registry.entries(full=True) if name in (ref.name, ref.qualified_name)}
    return [kind for kind in KINDS if kind in refs | disabled | published]


def _bare_steps(
    registry: Registry, kind: Kind, name: str, preferences: Mapping[str, str], winner: ComponentRef | None
) -> list[Step]:
    line = f"{kind.name}.{name}" if f"{kind.name}.{name}" in preferences else name
    wanted = preferences.get(line)
    qualified = wanted is not None and winner is not None and winner.qualified_name == wanted
    text = "none for this name" if wanted is None else f"plugins: {{{line}: {wanted}}}"
    if wanted is not None and winner is not None and not qualified and winner.value != wanted:
        text += " (provides that name in another kind only, so it is passed over)"
    steps = [Step("override lines", text, decides=wanted is not None and "passed over" not in text)]
    settled = steps[0].decides
    registered, override = registry._registered.get((kind.name, name), (None, False))
    text = (
        "none in this process" if registered is None else f"{registered.value}{', override=True' if override else ''}"
    )
    by_decorator = registered is not None and winner is registered
    steps.append(Step("decorators", text, decides=by_decorator and not settled))
    settled = settled or by_decorator
    steps += _entry_points(registry, kind, name, winner, settled)
    in_metadata = registered is not None or any(e.name == name for e in registry.index.of(kind.name))
    steps += _provision(registry, kind, name, winner, asked=not (settled or in_metadata))
    steps.append(_published(kind, name))
    return steps


def _entry_points(registry: Registry, kind: Kind, name: str, winner: ComponentRef | None, settled: bool) -> list[Step]:
    """One line for each distribution that has the group or is not admitted."""
    lines: list[Step] = []
    for dist, entries in _by_distribution(registry, kind).items():
        own = [e for e in entries if e.name == name]
        place = f"entry points of {dist}"
        refusal = registry._selection.refusal(dist.partition(" ")[0])
        if refusal is not None:
            lines.append(Step(place, f"{refusal}{': it has the name' if own else ''}"))
        elif own:
            problem = own[0].problem
            chosen = winner is not None and winner.qualified_name == f"{own[0].distribution.name}:{name}"
            lines.append(Step(place, problem or own[0].value, decides=chosen and not settled))
        else:
            listed = ", ".join(sorted(e.name for e in entries))
            lines.append(Step(place, f"not among its {len(entries)}: {listed}"))
    lines += [
        Step(f"misplaced group of {e.distribution.name} {e.distribution.version}", str(e.problem))
        for e in registry.index.misplaced()
        if e.name == name
    ]
    return lines or [Step("entry points", f"no installed distribution has the group [{kind.group}]")]


def _by_distribution(registry: Registry, kind: Kind) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    disabled = [e for e in registry.index.disabled if e.group == kind.group]
    for entry in [*registry.index.of(kind.name), *disabled]:
        found.setdefault(f"{entry.distribution.name} {entry.distribution.version}", []).append(entry)
    return dict(sorted(found.items()))


def _provision(registry: Registry, kind: Kind, name: str, winner: ComponentRef | None, *, asked: bool) -> list[Step]:
    hook = f"nemo_rl_{kind.name}"
    if not asked:
        return [Step("provision hooks", "not asked: the name was settled before")]
    provided = registry._from_hooks(kind.name)
    lines = [
        Step(f"hook {hook} of {ref.distribution or 'a plugin'}", str(ref.value), decides=winner is ref)
        for ref in provided
        if ref.name == name
    ]
    if lines:
        return lines
    listeners = len(registry.hooks.plugins)
    return [Step("provision hooks", f"{listeners} hook plugin(s) asked ({hook}): {len(provided)} names, not this one")]


def _published(kind: Kind, name: str) -> Step:
    package = known_package(kind.name, name)
    return Step("published packages", f"provided by {package}" if package else "no known package has the name")


def _qualified_steps(registry: Registry, kind: Kind, name: str, winner: ComponentRef | None) -> list[Step]:
    left, _, right = name.partition(":")
    dist = registry.distribution(left)
    refused = (
        registry._selection.refusal(left) if any(e.distribution.name == left for e in registry.index.disabled) else None
    )
    own = [ref.name for ref in registry.entries(kind.name) if dist is not None and ref.distribution == dist.name]
    if dist is not None:
        text = f"{dist.name} {dist.version} provides {', '.join(own) or f'no {kind.label}'}"
    else:
        text = refused or f"{left!r} is not an installed plugin distribution"
    by_path = winner is not None and winner.origin == "import path"
    steps = [Step("full name (dist:name)", text, decides=winner is not None and not by_path)]
    if dist is None or by_path:
        text = f"module {left!r}, attribute {right!r}" if by_path else f"{left!r} is no module that can be found"
        steps.append(Step("import path (module:attr)", text, decides=by_path))
    return steps
