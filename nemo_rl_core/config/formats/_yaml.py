"""YAML with a line for every key, and without the surprises of YAML 1.1.

As in the YAML 1.2 core schema, `1e-6` is a number, only `true` and `false` are booleans (`yes`, `no`, `on`
and `off` are text), `010` is ten, dates and `1:30` are text. A key that occurs twice is an error.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from nemo_rl_core.schema.mistakes import Key, Mistake, Position

__all__ = ["Loader", "Positions", "parse_scalar", "parse_yaml"]

Positions = dict[tuple[Key, ...], Position]

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_NULL = re.compile(r"~|null|Null|NULL|")
_MAX_VALUES = 100_000


class Loader(yaml.SafeLoader):
    """`SafeLoader` with the scalars of the YAML 1.2 core schema."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


def _resolver(tag: str, pattern: re.Pattern[str]) -> None:
    full = re.compile(rf"(?:{pattern.pattern})\Z")
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", full, None)


for _tag, _pattern in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT), ("merge", re.compile("<<"))):
    _resolver(_tag, _pattern)


def parse_yaml(text: str, source: str) -> tuple[Any, Positions, list[Mistake]]:
    """The document, the position of each key, and its mistakes (duplicate keys, unknown tags).

    A syntax error is a mistake too; the value is then None.
    """
    reader = _Reader(source)
    try:
        node = yaml.compose(text, Loader)
        value = None if node is None else reader.read(node, ())
    except yaml.YAMLError as error:
        reader.mistakes.append(_syntax(error, source))
        return None, reader.positions, reader.mistakes
    except RecursionError:
        reader.mistakes.append(Mistake(problem="nested too deeply", position=Position(source)))
        return None, reader.positions, reader.mistakes
    return value, reader.positions, reader.mistakes


def parse_scalar(text: str) -> object:
    """The value of an override, as YAML. Raises `yaml.YAMLError` or `ValueError`."""
    value, _, mistakes = parse_yaml(text, "command line")
    if mistakes:
        raise ValueError("; ".join(m.problem for m in mistakes))
    return value


class _Reader:
    """Turns the nodes of one document into plain data and notes where each key stands."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.positions: Positions = {}
        self.mistakes: list[Mistake] = []
        self.open: set[int] = set()
        self.count = 0

    def read(self, node: yaml.Node, keys: tuple[Key, ...]) -> Any:
        self.positions.setdefault(keys, self.position(node))
        self.count += 1
        if self.count > _MAX_VALUES:
            raise yaml.YAMLError("more than 100,000 values (aliases of aliases?)")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, keys)
        if id(node) in self.open:
            raise yaml.composer.ComposerError(None, None, "an alias contains itself", node.start_mark)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.read(child, (*keys, i)) for i, child in enumerate(node.value)]
            return self.mapping(node, keys)
        finally:
            self.open.discard(id(node))

    def mapping(self, node: yaml.Node, keys: tuple[Key, ...]) -> dict[Any, Any]:
        own: dict[Any, Any] = {}
        first: dict[Any, int] = {}
        merged: list[yaml.Node] = []
        for key_node, child in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                merged += child.value if isinstance(child, yaml.SequenceNode) else [child]
                continue
            key = self.scalar(key_node, keys) if isinstance(key_node, yaml.ScalarNode) else None
            if key is None and not isinstance(key_node, yaml.ScalarNode):
                self.add(keys, "a key must be a single word", key_node)
                continue
            key = key if isinstance(key, (str, int)) and not isinstance(key, bool) else key_node.value
            at = (*keys, key)
            if key in first:
                problem = f"the key is written twice, here and on line {first[key]}"
                self.add(at, problem, key_node, fix="Keep one of the two.")
                continue
            first[key] = self.position(key_node).line or 0
            self.positions[at] = self.position(key_node)
            own[key] = self.read(child, at)
        for other in merged:  # `<<`: earlier ones and own keys win
            self.merge(own, other, keys)
        return own

    def merge(self, own: dict[Any, Any], node: yaml.Node, keys: tuple[Key, ...]) -> None:
        if not isinstance(node, yaml.MappingNode):
            self.add(keys, "`<<` takes a mapping or a list of mappings", node)
            return
        own_positions, self.positions = self.positions, {}
        values = self.read(node, keys)
        self.positions = {**self.positions, **own_positions}
        for key, value in values.items():
            own.setdefault(key, value)

    def scalar(self, node: yaml.ScalarNode, keys: tuple[Key, ...]) -> object:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        text = str(node.value)
        try:
            if kind == "int":
                return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
            if kind == "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            self.add(keys, f"{text!r} is not a number", node)
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "null":
            return None
        if kind not in ("str", "merge"):
            self.add(keys, f"the tag {node.tag!r} is not supported", node, fix="Write the plain value.")
        return text

    def add(self, keys: tuple[Key, ...], problem: str, node: yaml.Node, fix: str | None = None) -> None:
        self.mistakes.append(Mistake(keys=keys, problem=problem, fix=fix, position=self.position(node)))

    def position(self, node: yaml.Node) -> Position:
        return Position(self.source, node.start_mark.line + 1)


def _syntax(error: yaml.YAMLError, source: str) -> Mistake:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = str(getattr(error, "problem", None) or error)
    context = getattr(error, "context", None)
    line = mark.line + 1 if mark else None
    text = f"not valid YAML: {problem}" + (f" ({context})" if context else "")
    if mark:
        text += f", column {mark.column + 1}"
    fix = (
        "Indent with spaces, not tabs." if "\\t" in problem else "Check indentation, colons, quotes and brackets there."
    )
    return Mistake(problem=text, fix=fix, position=Position(source, line))
