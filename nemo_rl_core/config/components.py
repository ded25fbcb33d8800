"""Components chosen in a configuration: resolves names, structures options by the component's class."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs

from nemo_rl_core.config.structure import structure
from nemo_rl_core.errors import PluginError, PluginNotFound
from nemo_rl_core.schema import ComponentChoice, PolicyConfig
from nemo_rl_core.schema.fields import fields_of
from nemo_rl_core.schema.mistakes import InvalidConfig, Key, Mistake, locate, suggest

__all__ = ["Reference", "Resolver", "default_resolver", "find", "finished_options", "resolve_choice", "resolve_tree"]


class Reference(Protocol):
    """A component found by name and not yet imported."""

    def config_class(self) -> type | None:
        """The class of its options. Raises `PluginBroken` if it cannot be found out."""
        ...


class Resolver(Protocol):
    """What configuration needs of the registry."""

    def resolve(self, kind: str, choice: object, *, plugins: Mapping[str, str] | None = None) -> Reference:
        """The component of that name or object, names settled by `plugins`. Raises a `PluginError`."""
        ...

    def default(self, kind: str) -> str | None:
        """The name used when none is chosen. Raises `PluginConflict` if that is not clear."""
        ...

    def names(self, kind: str) -> Sequence[str]:
        """All names of a kind."""
        ...


def default_resolver() -> Resolver:
    """The registry of this process."""
    from nemo_rl_core.registry import get_registry

    resolver: Resolver = get_registry()
    return resolver


def find(resolver: Resolver, kind: str, name: object, pins: Mapping[str, str]) -> Reference:
    """The component of that name or object; `pins` is only for a resolver that knows of conflicts."""
    return resolver.resolve(kind, name, plugins=pins) if pins else resolver.resolve(kind, name)


def resolve_choice(
    choice: ComponentChoice, kind: str, *, resolver: Resolver | None = None, pins: Mapping[str, str] | None = None
) -> tuple[ComponentChoice, list[Mistake]]:
    """Fill the default name of the kind and structure the options by the component's `config_class`.

    Args:
        choice: As configured; without a name it takes the default of its kind, if there is one.
        kind: Such as "environments".
        resolver: The registry; None is that of this process.
        pins: `RunConfig.plugins`.

    Returns:
        The choice, and its mistakes with paths relative to it.
    """
    pass_ = _Pass(resolver or default_resolver(), pins or {})
    name = choice.name
    if name is None:
        try:
            name = pass_.resolver.default(kind)
        except PluginError as error:
            return choice, [Mistake(keys=("name",), problem=str(error), error=error)]
        if name is None:
            return choice, pass_.no_default(kind, choice.options, "options", "name")
    options, mistakes = pass_.options(kind, name, choice.options, ("name",), ("options",))
    return ComponentChoice(name=name, options=options), mistakes


def finished_options(component: object, options: object) -> Any:
    """The options that a component is made with, where they have not been part of a configuration that was loaded.

    Args:
        component: Its `config_class`, an attrs class, says what its options are; without one they stay as they are.
        options: A mapping, an object of that class, or None for the defaults.

    Raises:
        InvalidConfig: They do not fit the class; lists every mistake.
    """
    config_class = getattr(component, "config_class", None)
    if isinstance(config_class, type) and isinstance(options, config_class):
        return options
    finished, mistakes = _Pass(default_resolver(), {}).finished(config_class, options)
    if mistakes:
        raise InvalidConfig(locate([m.under("options") for m in mistakes], {}))
    return finished


def resolve_tree(config: Any, resolver: Resolver, pins: Mapping[str, str]) -> tuple[Any, list[Mistake]]:
    """A copy of an attrs tree with the options of every chosen component structured, and the mistakes.

    A model beside the policy that names no backend takes the policy's.
    """
    policy = getattr(config, "policy", None)
    if isinstance(policy, PolicyConfig) and policy.backend is not None:
        others = {f.name: getattr(config, f.name) for f in fields_of(type(config))}
        unset = {n: m for n, m in others.items() if isinstance(m, PolicyConfig) and m.backend is None}
        if unset:
            config = attrs.evolve(config, **{n: attrs.evolve(m, backend=policy.backend) for n, m in unset.items()})
    return _Pass(resolver, pins).tree(config)


class _Pass:
    """One walk over a configuration."""

    def __init__(self, resolver: Resolver, pins: Mapping[str, str]) -> None:
        self.resolver = resolver
        self.pins = pins

    def tree(self, node: Any) -> tuple[Any, list[Mistake]]:
        changes: dict[str, Any] = {}
        mistakes: list[Mistake] = []
        for f in fields_of(type(node)):
            value = getattr(node, f.name)
            if "options_of" in f.metadata:
                changed, found = self.pair(node, f)
                changes.update(changed)
            elif "kind" in f.metadata:
                changes[f.name], found = self.choices(f.metadata["kind"], value, f.name)
            elif attrs.has(type(value)) and type(value).__module__ is not None and _is_config(f, value):
                changes[f.name], found = self.tree(value)
                found = [m.under(f.name) for m in found]
            else:
                continue
            mistakes += found
        return (attrs.evolve(node, **changes) if changes else node), mistakes

    def pair(self, node: object, f: attrs.Attribute[Any]) -> tuple[dict[str, Any], list[Mistake]]:
        """Two fields: the name of a component and its options."""
        kind, selector = f.metadata["options_of"]
        name, options = getattr(node, selector), getattr(node, f.name)
        if f.metadata.get("open") and not self.is_component(kind, name):
            return {}, []
        try:
            chosen = name if name is not None else self.resolver.default(kind)
        except PluginError as error:  # several are installed
            needed = bool(options) or f.metadata.get("required")
            return {}, [Mistake(keys=(selector,), problem=str(error), error=error)] if needed else []
        if chosen is None:
            return {}, self.no_default(kind, options, f.name, selector)
        structured, mistakes = self.options(kind, chosen, options, (selector,), (f.name,))
        if mistakes and name is None and not options and not f.metadata.get("required"):
            return {}, []  # nobody chose it: the run says so if it needs it
        return {selector: chosen, f.name: structured}, mistakes

    def choices(self, kind: str, value: object, name: str) -> tuple[Any, list[Mistake]]:
        """A `ComponentChoice`, or a tuple of them."""
        if isinstance(value, tuple):
            pairs = [self.choice(kind, item, (name, i)) for i, item in enumerate(value)]
            return tuple(item for item, _ in pairs), [m for _, found in pairs for m in found]
        return self.choice(kind, value, (name,)) if isinstance(value, ComponentChoice) else (value, [])

    def choice(self, kind: str, value: ComponentChoice, at: tuple[Key, ...]) -> tuple[Any, list[Mistake]]:
        name = value.name
        if name is None:
            if not value.options:
                return value, []  # the run decides whether it needs one
            try:
                name = self.resolver.default(kind)
            except PluginError as error:
                return value, [Mistake(keys=(*at, "name"), problem=str(error), error=error)]
            if name is None:
                return value, [m.under(*at) for m in self.no_default(kind, value.options, "options", "name")]
        options, mistakes = self.options(kind, name, value.options, ("name",), ("options",))
        return ComponentChoice(name=name, options=options), [m.under(*at) for m in mistakes]

    def options(
        self, kind: str, name: object, options: object, name_at: tuple[Key, ...], options_at: tuple[Key, ...]
    ) -> tuple[Any, list[Mistake]]:
        """Structure `options` by the class of the component; mistakes of finding it are mistakes too."""
        try:
            config_class = self.find(kind, name).config_class()
        except PluginError as error:
            return options, [self.not_found(kind, name, error, name_at)]
        finished, mistakes = self.finished(config_class, options)
        return finished, [m.under(*options_at) for m in mistakes]

    def finished(self, config_class: type | None, options: object) -> tuple[object, list[Mistake]]:
        """What a component with such options is made with: an object of their class, or settings as they are."""
        given = {} if options is None else options
        if config_class is None or not attrs.has(config_class):
            if isinstance(given, Mapping) or attrs.has(type(given)):
                return given, []
            return options, [Mistake(problem=f"expected a mapping of settings, found {options!r}")]
        structured, mistakes = structure(given, config_class)
        return (options, mistakes) if mistakes else self.tree(structured)

    def find(self, kind: str, name: object) -> Reference:
        return find(self.resolver, kind, name, self.pins)

    def is_component(self, kind: str, name: object) -> bool:
        """Whether `name` is a component of `kind` and not, as in `data.train.source`, data."""
        if not isinstance(name, str):
            return isinstance(name, type) or (callable(name) and hasattr(name, "config_class"))
        if name in self.resolver.names(kind) or (":" in name and "/" not in name):
            return True
        if not re.fullmatch(r"[\w-]+", name) or os.path.exists(name):
            return False
        try:  # one that is known only at run time, or a data set's name on a hub
            self.find(kind, name)
        except PluginError:
            return False
        return True

    def not_found(self, kind: str, name: object, error: PluginError, at: tuple[Key, ...]) -> Mistake:
        text = str(error)
        meant = None
        if isinstance(name, str) and isinstance(error, PluginNotFound) and "did you mean" not in text.lower():
            meant = suggest(name, self.resolver.names(kind))
        return Mistake(keys=at, problem=text.rstrip(".") if meant else text, suggestion=meant, error=error)

    def no_default(self, kind: str, options: object, options_name: str, selector: str) -> list[Mistake]:
        if not options:
            return []
        names = ", ".join(self.resolver.names(kind)) or "none is installed"
        word = kind.replace("_", " ")
        problem = f"options are set but no component is chosen (installed {word}: {names})"
        return [Mistake(keys=(options_name,), problem=problem, fix=f"Set `{selector}` beside it.")]


def _is_config(f: attrs.Attribute[Any], value: object) -> bool:
    """Whether the field is declared as a configuration class, not as anything."""
    from nemo_rl_core.schema.fields import config_class_of

    declared = config_class_of(f.type)
    return declared is not None and isinstance(value, declared)
