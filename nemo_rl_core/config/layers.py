"""Layers of a configuration: files with those that they extend, mappings, overrides."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from attrs import define, field

from nemo_rl_core.config.formats._yaml import Positions, parse_scalar, parse_yaml
from nemo_rl_core.schema.mistakes import Key, Mistake, Position

__all__ = ["Layer", "Overrides", "override_layers", "plain_tree", "read_file", "read_mapping"]

Overrides = Iterable[str] | Mapping[str, Any]
"""`["policy.optimizer.lr=1e-5"]`, or `{"policy.optimizer.lr": 1e-5}`."""


@define
class Layer:
    """One source of values; a later layer wins."""

    tree: dict[str, Any]
    positions: Positions = field(factory=dict)
    complete: bool = True
    """False for a file that could not be read, so that what is missing is no mistake of its own."""


def read_file(path: str | os.PathLike[str], chain: tuple[Path, ...] = ()) -> tuple[list[Layer], list[Mistake]]:
    """The layers of a file, those it extends first, and the mistakes of reading them."""
    file = Path(path).expanduser()
    tree, positions, mistakes = _parse(file)
    if tree is None:
        layer = Layer({}, positions, complete=not mistakes)
        return [layer], mistakes
    if not isinstance(tree, dict):
        problem = f"a configuration is a mapping of keys to values, found {_kind(tree)}"
        mistakes.append(Mistake(problem=problem, fix="Write `key: value` lines.", position=Position(str(path), 1)))
        return [Layer({}, complete=False)], mistakes
    layers, more = _with_bases(Layer(tree, positions), file.parent, (*chain, file.resolve()))
    return layers, [*mistakes, *more]


def read_mapping(tree: Mapping[str, Any]) -> tuple[list[Layer], list[Mistake]]:
    """The layers of a mapping; paths in its `extends` are relative to the current folder."""
    return _with_bases(Layer({key: plain_tree(value) for key, value in tree.items()}), Path(), ())


def override_layers(overrides: Overrides) -> tuple[list[Layer], list[Mistake]]:
    """One layer per override, in order."""
    layers: list[Layer] = []
    mistakes: list[Mistake] = []
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            layers.append(_dotted(str(key), plain_tree(value), Position("overrides")))
        return layers, mistakes
    position = Position("command line")
    for text in [overrides] if isinstance(overrides, str) else overrides:
        key, separator, value = text.partition("=")
        key = key.strip().removeprefix("--")
        if not separator or not key or not all(key.split(".")):
            fix = "Write `path.to.key=value`, such as `policy.optimizer.lr=1e-5`."
            mistakes.append(Mistake(problem=f"{text!r} is not an override", fix=fix, position=position))
            continue
        try:
            layers.append(_dotted(key, parse_scalar(value), position))
        except (yaml.YAMLError, ValueError) as error:
            problem = f"the value {value!r} cannot be read: {error}"
            keys = tuple(key.split("."))
            mistakes.append(Mistake(keys=keys, problem=problem, fix="Quote the value.", position=position))
    return layers, mistakes


def plain_tree(value: object) -> object:
    """A copy of nested mappings as dicts; every other object stays what it is."""
    if isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections", "types"):
        return {key: plain_tree(child) for key, child in value.items()}
    return value


def _with_bases(layer: Layer, folder: Path, chain: tuple[Path, ...]) -> tuple[list[Layer], list[Mistake]]:
    """The layers that `layer` extends, then itself."""
    if "extends" not in layer.tree:
        return [layer], []
    bases = layer.tree.pop("extends")
    position = layer.positions.get(("extends",), Position("Python"))
    names = [] if bases is None else [bases] if isinstance(bases, (str, os.PathLike)) else bases
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, (str, os.PathLike)) for n in names):
        problem = f"extends must be a file or a list of files, found {bases!r}"
        return [layer], [Mistake(keys=("extends",), problem=problem, position=position)]
    layers: list[Layer] = []
    mistakes: list[Mistake] = []
    missing = Layer({}, complete=False)
    for name in names:
        base = folder / Path(name).expanduser()
        if base.resolve() in chain:
            start = chain.index(base.resolve())
            loop = " -> ".join(_short(p) for p in (*chain[start:], base.resolve()))
            problem = f"the files extend each other in a circle: {loop}"
            mistakes.append(Mistake(keys=("extends",), problem=problem, fix="Remove one link.", position=position))
            layers.append(missing)
            continue
        if not base.exists():
            problem = f"the file {str(base)!r} does not exist"
            fix = "A path in `extends` is relative to the file that contains it."
            mistakes.append(Mistake(keys=("extends",), problem=problem, fix=fix, position=position))
            layers.append(missing)
            continue
        more, wrong = read_file(base, chain)
        layers += more
        mistakes += wrong
    return [*layers, layer], mistakes


def _parse(file: Path) -> tuple[Any, Positions, list[Mistake]]:
    """Read one file by its ending."""
    source = str(file)

    def failed(problem: str, fix: str) -> tuple[Any, Positions, list[Mistake]]:
        return None, {}, [Mistake(problem=problem, fix=fix, position=Position(source))]

    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return failed("the file does not exist", f"Check the path; the current folder is {Path.cwd()}.")
    except IsADirectoryError:
        return failed("this is a folder", "Give the configuration file in it.")
    except UnicodeDecodeError as error:
        return failed(
            f"not a text file in UTF-8: byte {error.start} is {error.object[error.start]:#04x}", "Save as UTF-8."
        )
    except OSError as error:
        return failed(f"the file cannot be read: {error.strerror or error}", "Check its permissions.")
    suffix = file.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return parse_yaml(text, source)
    if suffix == ".json":
        from nemo_rl_core.config.formats._json import parse_json

        return parse_json(text, source)
    if suffix == ".toml":
        from nemo_rl_core.config.formats._toml import parse_toml

        return parse_toml(text, source)
    return failed(f"unknown file type {suffix!r}", "Name it .yaml, .yml, .json or .toml.")


def _dotted(path: str, value: object, position: Position) -> Layer:
    keys: tuple[Key, ...] = tuple(path.split("."))
    tree: Any = value
    for key in reversed(keys):
        tree = {key: tree}
    positions: Positions = {keys[:end]: position for end in range(1, len(keys) + 1)}
    positions.update({(*keys, *more): position for more in _paths(value)})
    return Layer(tree, positions)


def _paths(value: object) -> Iterable[tuple[Key, ...]]:
    """The paths of all settings inside `value`."""
    for key, child in value.items() if isinstance(value, dict) else ():
        yield (key,)
        for more in _paths(child):
            yield (key, *more)


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else repr(value)


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
