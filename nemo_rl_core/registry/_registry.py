"""The registry: resolves names to components."""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from nemo_rl_core.errors import PluginBroken, PluginConflict, PluginError, PluginNotFound
from nemo_rl_core.registry import _manifest, _messages, _verification
from nemo_rl_core.registry._reference import ComponentRef, LoadStatus, Origin, is_importable
from nemo_rl_core.registry._typed import Choice, Plugins, Resolves
from nemo_rl_core.registry.discovery._compatibility import incompatibility
from nemo_rl_core.registry.discovery._distributions import Distribution, normalize
from nemo_rl_core.registry.discovery._index import CORE, DENY_VARIABLE, STRICT_VARIABLE, Entry, Index, Selection
from nemo_rl_core.registry.discovery._kinds import KINDS, Kind

if TYPE_CHECKING:
    from nemo_rl_core.registry._hook_plugin import HookPlugin
    from nemo_rl_core.registry._hooks import HookPlugins

__all__ = ["Registry", "get_registry"]

logger = logging.getLogger("nemo_rl_core.registry")


class Registry(Resolves):
    """Finds components of every kind; imports one only when it is loaded.

    Args:
        allow: Distributions whose plugins may be used; None takes NEMO_RL_PLUGINS, unset meaning all.
        deny: Distributions whose plugins may not; None takes NEMO_RL_DISABLE_PLUGINS.
        strict: Any broken plugin is an error, even one that is not used; None takes
            NEMO_RL_STRICT_PLUGINS.
    """

    def __init__(
        self,
        *,
        allow: Iterable[str] | None = None,
        deny: Iterable[str] | None = None,
        strict: bool | None = None,
    ) -> None:
        self._selection = Selection.from_environment(allow, deny)
        in_environment = os.environ.get(STRICT_VARIABLE, "").lower() not in ("", "0", "false", "no")
        self.strict: bool = in_environment if strict is None else strict
        self._registered: dict[tuple[str, str], tuple[ComponentRef, bool]] = {}
        self._preferences: dict[str, str] = {}
        self._lock = threading.RLock()
        self.refresh()

    def refresh(self) -> None:
        """Forget what is installed, so that it is read again; what decorators registered stays."""
        self._index: Index | None = None
        self._refs: dict[str, list[ComponentRef]] = {}
        self._provided: dict[str, list[ComponentRef]] = {}
        self._hooks: HookPlugins | None = None
        self._warned = False
        self._shadows_told: set[tuple[str, str]] = set()
        self.providers: dict[Any, Any] = {}
        """Who provides which class or function; filled when a message or a trace asks."""

    @property
    def index(self) -> Index:
        """The entry points of what is installed, read at the first use."""
        with self._lock:
            if self._index is None:
                self._index = Index(self._selection)
            return self._index

    @property
    def hooks(self) -> HookPlugins:
        """The installed hook plugins, imported at the first use, each isolated from the others."""
        with self._lock:
            if self._hooks is None:
                from nemo_rl_core.registry._hooks import HookPlugins

                self._hooks = HookPlugins.installed(self)
            return self._hooks

    def distribution(self, name: str) -> Distribution | None:
        """An installed distribution that provides anything, by its name."""
        return self.index.distributions.get(normalize(name))

    # -- listing ------------------------------------------------------------------------------

    def entries(self, kind: str | None = None, *, full: bool = False) -> list[ComponentRef]:
        """All components, by kind, name and provider; broken ones included.

        Args:
            kind: One kind; None is all.
            full: Also ask provision hooks, which imports the hook plugins.
        """
        found: list[ComponentRef] = []
        for each in [self._kind(kind).name] if kind is not None else KINDS:
            refs = [*self._installed(each), *(r for (k, _), (r, _) in self._registered.items() if k == each)]
            if full:
                refs += self._from_hooks(each)
            found += sorted(refs, key=lambda ref: (ref.name, ref.qualified_name))
        return found

    def names(self, kind: str, *, full: bool = False) -> list[str]:
        """Names of one kind that can be asked for, sorted; see `entries`."""
        return sorted({ref.name for ref in self.entries(kind, full=full) if ref.state != "broken"})

    def problems(self) -> list[tuple[str, PluginError]]:
        """What is wrong with installed plugins, as far as metadata tells: (distribution, error) each."""
        unreadable = self.index.unreadable
        found: list[tuple[str, PluginError]] = [
            (name, PluginBroken(f"Plugin {name} {dist.version}: {dist.problem}. Install it again, or disable it."))
            for name, dist in unreadable.items()
        ]
        for entry in self.index.misplaced():
            dist = entry.distribution
            if dist.name in unreadable:
                continue
            found.append((dist.name, PluginBroken(f"Plugin {dist.name} {dist.version}: {entry.problem}.")))
        for ref in self.entries():
            if ref.distribution in unreadable:
                continue
            try:
                ref.check()
            except PluginError as error:
                found.append((ref.distribution or ref.name, error))
        return found

    def check(self) -> None:
        """Name each broken plugin in one warning, once; under strict, refuse to go on.

        A run calls it when all that it uses is loaded: what is still broken then is not used.

        Raises:
            PluginBroken: Strict, and something is broken; lists everything that is.
        """
        self._require_sound()
        problems = [] if self._warned else self.problems()
        self._warned = True
        for distribution, problem in problems:
            logger.warning("%s (It is not used, so this is all; %s=%s hides it.)", problem, DENY_VARIABLE, distribution)

    def _require_sound(self) -> None:
        """Under strict, refuse to go on with anything that is broken."""
        problems = self.problems() if self.strict and not self._warned else []
        if problems:
            listing = "\n".join(f"- {problem}" for _, problem in problems)
            raise PluginBroken(f"Broken plugins (strict mode):\n{listing}")
        self._warned = self._warned or self.strict

    # -- resolving ----------------------------------------------------------------------------

    def _resolve(self, kind: str, choice: Choice, plugins: Plugins) -> ComponentRef[Any]:
        which = self._kind(kind)
        self._require_sound()
        if choice is None:
            choice = self.default(kind)
            if choice is None:
                raise PluginNotFound(
                    f"No {which.label} is installed. Such packages are usually named {which.package_hint}."
                )
        if isinstance(choice, ComponentRef):
            if choice.kind != kind:
                raise PluginError(f"Expected a {which.label}, got the {choice.description}.")
            ref = choice
        elif not isinstance(choice, str):
            ref = self._of_object(which, choice)
        elif ":" in choice:
            ref = self._qualified(which, choice)
        else:
            ref = self._bare(which, choice, {**self._preferences, **(plugins or {})})
        ref.check()
        return ref

    def default(self, kind: str, *cases: str) -> str | None:
        """Name used where a configuration names none.

        What the hook `nemo_rl_defaults` says, else the only component of the kind; None if none is installed.

        Args:
            kind: Such as "weight_syncs".
            cases: Those in which another component may be the default, such as "workers", which is declared as
                "weight_syncs.workers"; the first one for which any is declared counts.

        Raises:
            PluginConflict: Several are installed, and no default or more than one is declared.
        """
        which = self._kind(kind)
        self._require_sound()
        names = self.names(kind)
        said = list(self.hooks.call_each("nemo_rl_defaults"))
        declared: dict[str, object] = {}
        for key in [f"{kind}.{case}" for case in cases] or [kind]:
            of_case = {name: plugin for plugin, defaults in said if (name := defaults.get(key)) is not None}
            declared = {name: plugin for name, plugin in of_case.items() if name in names or ":" in name}
            if declared:
                break
        if len(declared) > 1:
            each = "; ".join(f"{plugin} says {name!r}" for name, plugin in sorted(declared.items()))
            raise PluginConflict(f"The default {which.label} is declared twice: {each}. Name one in the configuration.")
        if declared:
            return next(iter(declared))
        if len(names) > 1:
            raise PluginConflict(
                f"No {which.label} is chosen, and several are installed: {', '.join(names)}. "
                "Name one in the configuration."
            )
        return names[0] if names else None

    def prefer(self, plugins: Mapping[str, str]) -> None:
        """Settle conflicts for this process: bare name (or `kind.name`) to full name."""
        for name, full in plugins.items():
            if not isinstance(full, str) or ":" not in full:
                raise PluginError(
                    f"plugins: {name}: {full!r} is not a full name; expected `dist:name` or `module:attr`."
                )
        self._preferences.update(plugins)

    def _kind(self, kind: str) -> Kind:
        if kind in KINDS:
            return KINDS[kind]
        close = get_close_matches(kind, KINDS, n=1)
        raise PluginError(
            f"There is no kind of component {kind!r}. "
            + (f"Did you mean {close[0]!r}?" if close else f"The kinds are: {', '.join(KINDS)}.")
        )

    def _bare(self, kind: Kind, name: str, preferences: Mapping[str, str]) -> ComponentRef:
        wanted = preferences.get(f"{kind.name}.{name}") or preferences.get(name)
        if wanted is not None:
            preferred = self._preferred(kind, name, wanted)
            if preferred is not None:
                return preferred
        installed = [ref for ref in self._installed(kind.name) if ref.name == name]
        registered, override = self._registered.get((kind.name, name), (None, False))
        if registered is not None and (override or not installed):
            return registered
        candidates = installed + ([registered] if registered is not None else [])
        if not candidates:
            candidates = [ref for ref in self._from_hooks(kind.name) if ref.name == name]
        built_in = [ref for ref in candidates if ref.distribution == CORE]
        if built_in and registered is None:
            self._tell_of_shadows(kind, name, [ref for ref in candidates if ref not in built_in])
            return built_in[0]
        if len(candidates) > 1:
            raise _messages.conflict(kind, name, candidates)
        if not candidates:
            disabled = [
                (e, self._selection.refusal(e.distribution.name) or "")
                for e in self.index.disabled
                if e.group == kind.group and e.name == name
            ]
            raise _messages.not_found(kind, name, self.names(kind.name, full=True), disabled)
        return candidates[0]

    def _tell_of_shadows(self, kind: Kind, name: str, shadows: Sequence[ComponentRef]) -> None:
        """A plugin that takes a name of the core is used only when asked for by its full name; say so once."""
        if shadows and (kind.name, name) not in self._shadows_told:
            self._shadows_told.add((kind.name, name))
            others = ", ".join(f"{ref.distribution} {ref.version} ({ref.qualified_name})" for ref in shadows)
            logger.warning(
                "The %s %r is the core's own; that of %s is not used. To use it, write plugins: {%s: %r}.",
                kind.label,
                name,
                others,
                name,
                shadows[0].qualified_name,
            )

    def _preferred(self, kind: Kind, name: str, wanted: str) -> ComponentRef | None:
        """The preferred provider; None if it has that name in another kind only (one line may serve two)."""
        provider, _, own_name = wanted.partition(":")
        try:
            return self._qualified(kind, wanted)
        except PluginNotFound as error:
            elsewhere = any(ref.name == own_name and ref.distribution == normalize(provider) for ref in self.entries())
            if elsewhere:
                return None
            raise PluginNotFound(f"plugins: {{{name}: {wanted!r}}} leads nowhere. {error}") from None

    def _qualified(self, kind: Kind, choice: str) -> ComponentRef:
        left, _, right = choice.partition(":")
        for ref in self.entries(kind.name):
            if ref.qualified_name == choice or (ref.distribution == normalize(left) and ref.name == right):
                return ref
        dist = self.distribution(left)
        if dist is not None:
            for ref in self._from_hooks(kind.name):
                if ref.distribution == dist.name and ref.name == right:
                    return ref
        if _is_module(left):
            return ComponentRef(
                kind=kind.name, name=choice, value=choice, origin="import path", api_version=kind.api_version
            )
        if dist is not None:
            own = [ref.name for ref in self.entries(kind.name, full=True) if ref.distribution == dist.name]
            raise PluginNotFound(
                f"{dist.name} {dist.version} provides no {kind.label} named {right!r}. "
                f"It provides: {', '.join(own) or f'no {kind.label} at all'}."
            )
        raise PluginNotFound(
            f"{choice!r}: {left!r} is neither an installed plugin distribution nor a module that can be imported. "
            f"To use it as `dist:name`, install {left}; as `module:attr`, run from its folder or install it."
        )

    def _of_object(self, kind: Kind, component: object) -> ComponentRef:
        for registered, _ in self._registered.values():
            if registered.kind == kind.name and registered._status.component is component:
                return registered
        ref = _reference_to(kind, component, name=None, origin="object")
        for installed in self._installed(kind.name):
            if ref.value is not None and installed.value == ref.value:
                return installed
        return ref

    # -- sources of components ------------------------------------------------------------------

    def _installed(self, kind: str) -> list[ComponentRef]:
        if kind not in self._refs:
            self._refs[kind] = [self._of_entry(KINDS[kind], entry) for entry in self.index.of(kind)]
        return self._refs[kind]

    def _of_entry(self, kind: Kind, entry: Entry) -> ComponentRef:
        index, dist = self.index, entry.distribution

        def check() -> str | None:
            if entry.problem is not None:
                raise PluginBroken(f"Plugin {dist.name} {dist.version}: {entry.problem}. Upgrade it or disable it.")
            return incompatibility(index, dist, kind.name)

        return ComponentRef(
            kind=kind.name,
            name=entry.name,
            value=entry.value,
            distribution=dist.name,
            version=dist.version,
            api_version=kind.api_version,
            editable=dist.editable,
            check=check,
        )

    def _from_hooks(self, kind: str) -> list[ComponentRef]:
        """What provision hooks hand over, asked once."""
        if kind not in self._provided:
            self._provided[kind] = [
                self._of_provision(KINDS[kind], plugin.distribution, name, target)
                for plugin, provided in self.hooks.call_each(f"nemo_rl_{kind}")
                for name, target in provided.items()
            ]
        return self._provided[kind]

    def _of_provision(self, kind: Kind, dist: Distribution | None, name: str, target: object) -> ComponentRef:
        if isinstance(target, str):
            ref = ComponentRef(kind=kind.name, name=name, value=target, origin="hook", api_version=kind.api_version)
        else:
            ref = _reference_to(kind, target, name=name, origin="hook")
        if dist is None:
            return ref
        from attrs import evolve

        return evolve(ref, distribution=dist.name, version=dist.version, editable=dist.editable)

    def register(self, kind: str, name: str, component: object, *, override: bool = False) -> ComponentRef:
        """Register a component from user code; the decorators call this.

        Args:
            kind: Plural name of the kind.
            name: Bare name; may not hold a colon.
            component: A class or a function (or an object that has the contract's members).
            override: Take the place of an installed component of the same name.

        Raises:
            PluginError: The name or the component cannot be registered.
            PluginConflict: Other user code has registered the name.
        """
        which = self._kind(kind)
        if not isinstance(name, str) or not name or ":" in name or name != name.strip():
            raise PluginError(f"{name!r} cannot be the name of a {which.label}: expected a word without a colon.")
        ref = _reference_to(which, component, name=name, origin="decorator")
        before, _ = self._registered.get((kind, name), (None, False))
        if before is not None and not override and before.value != ref.value:
            raise PluginConflict(
                f"The {which.label} {name!r} is already registered as {before.value}, and now as {ref.value}. "
                "Choose another name, or pass override=True."
            )
        self._registered[kind, name] = (ref, override)  # the same definition again: a notebook cell was run twice
        return ref

    def unregister(self, kind: str, name: str) -> None:
        """Take back what `register` did; nothing happens if it did nothing."""
        self._registered.pop((kind, name), None)

    # -- manifests --------------------------------------------------------------------------------

    def manifest(self, refs: Iterable[ComponentRef], hooks: Iterable[HookPlugin] = ()) -> list[dict[str, Any]]:
        """See `nemo_rl_core.registry.manifest`."""
        return _manifest.manifest(refs, hooks)

    def check_manifest(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """In a worker: compare the driver's manifest with what is installed here, importing nothing.

        Raises:
            PluginIncompatible: Something differs; the message holds a table of node, plugin, found, expected.
        """
        _verification.check_nodes(_verification.node_differences(rows, self))


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return name == "__main__"


def _reference_to(kind: Kind, component: object, *, name: str | None, origin: Origin) -> ComponentRef:
    module, qualname = getattr(component, "__module__", None), getattr(component, "__qualname__", None)
    value = f"{module}:{qualname}" if module and qualname else None
    if origin != "decorator" and value is not None and not is_importable(value, component):
        value = value if module in ("__main__", "__mp_main__") else None
    own = getattr(component, "__name__", None) or type(component).__name__
    return ComponentRef(
        kind=kind.name,
        name=name or own,
        value=value,
        origin=origin,
        api_version=kind.api_version,
        status=LoadStatus(component=component),
    )


_registry: Registry | None = None


def get_registry() -> Registry:
    """The registry of this process, made at the first call from the environment's settings."""
    global _registry
    if _registry is None:
        _registry = Registry()
    return _registry
