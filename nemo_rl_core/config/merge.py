"""Merging of layers into one tree: mappings merge, other values are replaced, positions follow their values.

Three rules keep a later layer from tripping over an earlier one. Choosing another component drops the options
of the one chosen before. Setting a shorthand (`model`) drops the long form (`policy.model_name`) of earlier
layers, and the other way round. A number as a key changes that item of a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from nemo_rl_core.config.filling import DERIVED, filled, value_at
from nemo_rl_core.config.formats._yaml import Positions
from nemo_rl_core.config.layers import Layer
from nemo_rl_core.config.structure import structure, without
from nemo_rl_core.schema import ComponentChoice
from nemo_rl_core.schema.fields import config_class_of, fields_of, same, shorthands
from nemo_rl_core.schema.mistakes import Key, Mistake, path_of

__all__ = ["merge_layers"]

_MISSING = object()


def merge_layers(layers: Iterable[Layer], cls: type) -> tuple[dict[str, Any], Positions, list[Mistake]]:
    """The tree of all layers for the root class `cls`, where each value comes from, and contradictions."""
    merged = _Merged()
    mistakes: list[Mistake] = []
    for layer in layers:
        mistakes += _contradictions(layer, cls)
        merged.add(layer, cls)
    return merged.tree, merged.positions, mistakes


class _Merged:
    """The layers so far."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self.positions: Positions = {}
        self.dropped: list[tuple[Key, ...]] = []

    def add(self, layer: Layer, cls: type) -> None:
        self.dropped = []
        for path, (source, _) in DERIVED.items():
            if _sets(layer.tree, source, cls) and self.was_derived(path, cls):
                self.drop(path)
        for short, long in shorthands(cls).items():
            if _get(layer.tree, (short,)) not in (None, _MISSING):
                self.drop(long)
            if _get(layer.tree, long) not in (None, _MISSING):
                self.drop((short,))
        self.tree = self.merge(self.tree, layer.tree, cls, ())
        gone = set(self.dropped)
        kept = {k: p for k, p in self.positions.items() if not any(k[:n] in gone for n in range(1, len(k) + 1))}
        self.positions = {**kept, **layer.positions}

    def was_derived(self, path: tuple[str, ...], cls: type) -> bool:
        """Whether the value at `path` is what `finalize` fills in, so that it should follow its source."""
        value = _get(self.tree, path)
        if value in (None, _MISSING):
            return False
        config = structure(without(self.tree, path), cls)[0]
        return config is not None and same(value_at(filled(config)[0], path), value)

    def drop(self, keys: tuple[Key, ...]) -> None:
        """Forget the value at `keys`."""
        *parents, last = keys
        self.tree = dict(self.tree)
        node: Any = self.tree
        for key in parents:
            child = _opened(node.get(key))
            if child is None:
                return
            node[key] = child
            node = child
        if node.pop(last, _MISSING) is not _MISSING:
            self.dropped.append(keys)

    def merge(
        self, base: dict[str, Any], over: dict[str, Any], cls: type | None, at: tuple[Key, ...]
    ) -> dict[str, Any]:
        """A new mapping of both, `over` winning."""
        result = dict(base)
        for selector, options in _selectors(cls):
            old, new = base.get(selector), over.get(selector, _MISSING)
            changes = old is not None and new is not _MISSING and not same(old, new)
            if changes and result.pop(options, _MISSING) is not _MISSING:
                self.dropped.append((*at, options))
        types = {f.name: config_class_of(f.type) for f in fields_of(cls)} if cls else {}
        for key, value in over.items():
            result[key] = self.value(result.get(key), value, types.get(key), (*at, key))
        return result

    def value(self, base: object, over: object, cls: type | None, at: tuple[Key, ...]) -> object:
        """What `over` makes of the value `base`."""
        if cls is ComponentChoice and isinstance(over, dict) and base is not None and _opened(base) is None:
            base = {"name": base}
        opened = _opened(base)
        if isinstance(over, dict) and opened is not None:
            return self.merge(opened, over, cls, at)
        if (
            isinstance(over, dict)
            and over
            and isinstance(base, (list, tuple))
            and all(_is_index(k, base) for k in over)
        ):
            items = list(base)
            for key, item in over.items():
                items[int(key)] = self.value(items[int(key)], item, None, (*at, int(key)))
            return items
        self.dropped.append(at)
        return over


def _contradictions(layer: Layer, cls: type) -> Iterable[Mistake]:
    """Shorthands that say something else than the long form in the same place."""
    for short, long in shorthands(cls).items():
        left, right = _get(layer.tree, (short,)), _get(layer.tree, long)
        if left not in (None, _MISSING) and right not in (None, _MISSING) and left != right:
            problem = f"{short} is {left!r} but {path_of(long)} is {right!r}; {short} is a shorthand for it"
            position = layer.positions.get((short,))
            yield Mistake(
                keys=(short,), problem=problem, fix="Keep one of the two.", related=(long,), position=position
            )


def _sets(tree: object, path: tuple[str, ...], cls: type) -> bool:
    """Whether a layer sets the value at `path`, by its name or by a shorthand."""
    names = [path, *((short,) for short, long in shorthands(cls).items() if long == path)]
    return any(_get(tree, name) is not _MISSING for name in names)


def _selectors(cls: type | None) -> list[tuple[str, str]]:
    """Fields that choose a component, with the field of its options."""
    if cls is None:
        return []
    if cls is ComponentChoice:
        return [("name", "options")]
    return [(f.metadata["options_of"][1], f.name) for f in fields_of(cls) if "options_of" in f.metadata]


def _opened(value: Any) -> dict[str, Any] | None:
    """A mapping or an attrs object as a new dict; None for anything else."""
    if isinstance(value, dict):
        return dict(value)
    if attrs.has(type(value)):
        return {f.name: getattr(value, f.name) for f in attrs.fields(type(value)) if f.init}
    return None


def _get(tree: object, keys: Sequence[Key]) -> object:
    for key in keys:
        opened = _opened(tree)
        if opened is None or key not in opened:
            return _MISSING
        tree = opened[key]
    return tree


def _is_index(key: Any, items: Sequence[Any]) -> bool:
    return str(key).isdigit() and int(key) < len(items)
