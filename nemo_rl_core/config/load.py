"""`load_config` and `finalize`: turn files, mappings and overrides into the configuration of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rl_core.config.checks import check_tree
from nemo_rl_core.config.components import Resolver, default_resolver, find, resolve_tree
from nemo_rl_core.config.filling import filled
from nemo_rl_core.config.layers import Layer, Overrides, override_layers, read_file, read_mapping
from nemo_rl_core.config.merge import merge_layers
from nemo_rl_core.config.structure import structure, structure_partially
from nemo_rl_core.config.user_code import explain_user_code
from nemo_rl_core.errors import ConfigError, PluginError, PluginNotFound
from nemo_rl_core.schema import RunConfig
from nemo_rl_core.schema.fields import default_of, fields_of
from nemo_rl_core.schema.mistakes import InvalidConfig, Key, Mistake, locate, suggest

__all__ = ["Source", "finalize", "load_config"]

Source = str | os.PathLike[str] | Mapping[str, Any] | RunConfig
"""A file (.yaml, .yml, .json, .toml), a mapping, or a configuration."""


def load_config(
    source: Source,
    *,
    overrides: Overrides = (),
    config_class: type[RunConfig] | None = None,
    resolver: Resolver | None = None,
    check: bool = True,
) -> RunConfig:
    """Read a configuration, reporting every mistake of it at once.

    What comes back is what was written, typed, with the default backends named and components' options
    structured; `finalize` fills in what is derived.

    Args:
        source: File, mapping or configuration. `extends` in it names files to start from.
        overrides: Dotted values that win over the source, in order.
        config_class: Root class; None takes that of the algorithm named by `algorithm`.
        resolver: The registry; None is that of this process.
        check: Also find the components and check arithmetic between fields. Turn it off for a part of a
            configuration that is to be completed in Python.

    Raises:
        InvalidConfig: With all mistakes; a `ConfigError`.
    """
    layers, mistakes = _layers(source, overrides)
    complete = all(layer.complete for layer in layers)
    if not any(layer.tree for layer in layers) and not complete:
        raise InvalidConfig(locate(mistakes, {}))
    resolver = resolver or default_resolver()
    if isinstance(source, RunConfig) and config_class is None:
        root, unknown = type(source), list[Mistake]()
    else:
        root, unknown = _root_class(layers, config_class, resolver)
    mistakes += unknown if complete else []
    tree, positions, found = merge_layers(layers, root)
    mistakes += found
    config, found = structure_partially(tree, root)
    if unknown:  # the algorithm's own keys cannot be told from typos
        found = [m for m in found if m.problem != "unknown key" or len(m.keys) > 1]
    mistakes += found
    if config is not None and check and complete:
        config, found = _checked(config, resolver, mistakes)
        mistakes += found
    if mistakes or config is None:
        raise InvalidConfig(locate(explain_user_code(mistakes, tree), positions))
    result: RunConfig = config
    return result


def finalize(config: RunConfig, *, resolver: Resolver | None = None) -> RunConfig:
    """The configuration a run uses: shorthands applied, blanks filled, components' options structured.

    Applying it twice changes nothing. Filled are `policy.model_name` and `policy.optimizer.lr` (from the
    shorthands), the backends and the launcher (default of their kind), what `generation` takes from the
    policy, and `policy.scheduler.total_steps`. A `ComponentChoice` without a name stays so: whether the run
    needs one is the run's to say.

    Raises:
        InvalidConfig: With all mistakes, those of values set in Python included.
    """
    resolver = resolver or default_resolver()
    structured, mistakes = structure(config, type(config))
    if mistakes:
        raise InvalidConfig(locate(mistakes, {}))
    resolved, mistakes = resolve_tree(structured, resolver, structured.plugins)
    final, found = filled(resolved)
    mistakes += found
    mistakes += check_tree(final)
    if mistakes:
        raise InvalidConfig(locate(mistakes, {}))
    return final


def _layers(source: Source, overrides: Overrides) -> tuple[list[Layer], list[Mistake]]:
    mistakes: list[Mistake] = []
    if isinstance(source, RunConfig):
        values = {f.name: getattr(source, f.name) for f in fields_of(type(source))}
        layers = [Layer(values)]
    elif isinstance(source, Mapping):
        layers, mistakes = read_mapping(source)
    elif isinstance(source, (str, os.PathLike)):
        layers, mistakes = read_file(source)
    else:
        raise ConfigError(f"A configuration is a file, a mapping or a RunConfig, found {type(source).__name__}.")
    more, wrong = override_layers(overrides)
    return [*layers, *more], [*mistakes, *wrong]


def _root_class(
    layers: Sequence[Layer], config_class: type[RunConfig] | None, resolver: Resolver
) -> tuple[type[RunConfig], list[Mistake]]:
    """The class of the whole tree; `RunConfig` stands in when the algorithm cannot be found."""
    keys: tuple[Key, ...] = ("algorithm",)
    named = [layer.tree["algorithm"] for layer in layers if layer.tree.get("algorithm") is not None]
    pins: dict[str, str] = {}
    for layer in layers:
        pins.update(layer.tree["plugins"] if isinstance(layer.tree.get("plugins"), dict) else {})
    if config_class is not None:
        default = next((default_of(f) for f in fields_of(config_class) if f.name == "algorithm"), None)
        if not named or default is None or default in (named[-1], _plain_name(named[-1])):
            return config_class, []
        root, mistakes = _class_of_algorithm(named[-1], pins, resolver)
        if not mistakes and issubclass(root, config_class):  # another algorithm with the same settings
            return root, []
        problem = f"found {named[-1]!r}, but the class used is {config_class.__name__}, of {default!r}"
        return config_class, [Mistake(keys=keys, problem=problem, fix=f"Write `algorithm: {default}`.")]
    if not named:
        names = ", ".join(resolver.names("algorithms")) or "none is installed"
        written = [key for layer in layers for key in layer.tree]
        near = next((k for k in written if suggest(k, ["algorithm"])), None)
        problem = "no algorithm is chosen" + (f" (is `{near}` meant for `algorithm`?)" if near else "")
        m = Mistake(keys=keys, problem=problem, allowed=names, fix="Add `algorithm: <name>`.")
        return RunConfig, [m]
    return _class_of_algorithm(named[-1], pins, resolver)


def _class_of_algorithm(
    name: object, pins: Mapping[str, str], resolver: Resolver
) -> tuple[type[RunConfig], list[Mistake]]:
    keys: tuple[Key, ...] = ("algorithm",)
    try:
        config_class = find(resolver, "algorithms", name, pins).config_class()
    except PluginError as error:
        meant = None
        if isinstance(name, str) and isinstance(error, PluginNotFound) and "did you mean" not in str(error).lower():
            meant = suggest(name, resolver.names("algorithms"))
        return RunConfig, [Mistake(keys=keys, problem=str(error), suggestion=meant, error=error)]
    if config_class is None or not issubclass(config_class, RunConfig):
        problem = f"the config_class of {name!r} is {config_class!r}, not a RunConfig"
        return RunConfig, [Mistake(keys=keys, problem=problem, fix="Fix the plugin that provides it.")]
    return config_class, []


def _checked(config: RunConfig, resolver: Resolver, before: Sequence[Mistake]) -> tuple[RunConfig, list[Mistake]]:
    """The configuration with structured options, and the mistakes that do not follow from earlier ones."""
    unknown_root = any(m.keys == ("algorithm",) for m in before)
    resolved, mistakes = resolve_tree(config, resolver, config.plugins)
    wrong = {m.keys for m in (*before, *mistakes) if m.keys}
    wrong |= {(*m.keys[:-1], m.suggestion) for m in before if m.suggestion and m.keys}  # a typo of that key
    final, found = filled(resolved)
    later = [*found, *([] if unknown_root else check_tree(final))]
    mistakes += [m for m in later if not any(_touches(m, keys) for keys in wrong)]
    return resolved, mistakes


def _touches(m: Mistake, keys: tuple[Key, ...]) -> bool:
    """Whether a value that takes part in `m` is at, above or below `keys`."""
    for own in (m.keys, *m.related):
        shorter = min(len(own), len(keys))
        if own[:shorter] == keys[:shorter]:
            return True
    return False


def _plain_name(name: object) -> object:
    return name.rpartition(":")[2] if isinstance(name, str) else name
