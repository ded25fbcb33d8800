"""Configurations as plain data and YAML, and the difference of two."""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from nemo_rl_core.schema import ComponentChoice, RunConfig
from nemo_rl_core.schema.fields import default_of, fields_of, same

__all__ = ["Difference", "diff", "to_dict", "to_yaml"]


def to_dict(config: object, *, defaults: bool = True) -> dict[str, Any]:
    """Plain data that `load_config` turns back into an equal configuration.

    Python objects become `module:attr`; those without an importable name become a note in angle brackets.

    Args:
        config: A configuration or a part of one.
        defaults: False leaves out what has its default value, but never `algorithm`.
    """
    result: dict[str, Any] = {}
    for f in sorted(fields_of(type(config)), key=lambda f: f.name != "algorithm"):  # it picks the class: first
        value = getattr(config, f.name)
        needed = f.default is attrs.NOTHING or (f.name == "algorithm" and value is not None)
        if not defaults and not needed and same(value, default_of(f)):
            continue
        # What a preset's component has of its own is no default of the component's class: shown in full.
        preset = bool(getattr(default_of(f), "options", None)) and "kind" in f.metadata
        plain = _plain(value, defaults or preset)
        if not needed and not defaults and plain == {} and attrs.has(type(value)):
            continue  # options of which none was changed
        result[f.name] = plain
    return result


def to_yaml(config: object, *, docs: bool = False, defaults: bool = True) -> str:
    """`to_dict` as YAML; with `docs` each setting has its documentation above it."""
    lines = [""]
    for text in _yaml_lines(config, docs, defaults, ""):
        if docs and lines[-1] and text.startswith("#"):
            lines.append("")
        lines.append(text)
    return "\n".join(lines[1:]) + "\n" if len(lines) > 1 else "{}\n"


@frozen
class Difference:
    """A value that two configurations do not share."""

    path: str
    left: object
    """`NOT_SET` where the left one has no such setting."""
    right: object


class _NotSet:
    def __repr__(self) -> str:
        return "<not set>"

    def __bool__(self) -> bool:
        return False


NOT_SET = _NotSet()
"""In a `Difference`, the side that has no such setting."""


def diff(left: RunConfig | Mapping[str, Any], right: RunConfig | Mapping[str, Any]) -> list[Difference]:
    """Every dotted path at which two configurations differ, in the order of the left one.

    Lists are compared whole; a mapping on one side only is given setting by setting.
    """
    a, b = (dict(_flat(c if isinstance(c, Mapping) else to_dict(c), ())) for c in (left, right))
    paths = dict.fromkeys([*a, *b])
    pairs = ((path, a.get(path, NOT_SET), b.get(path, NOT_SET)) for path in paths)
    return [Difference(".".join(path), x, y) for path, x, y in pairs if not _same(x, y)]


def _plain(value: Any, defaults: bool) -> object:
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, ComponentChoice):
        options = _plain(value.options, defaults)
        return {"name": _plain(value.name, defaults), "options": options} if options else _plain(value.name, defaults)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return str(Path(value))
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return _name(value)
    if attrs.has(type(value)):
        return to_dict(value, defaults=defaults)
    if type(value) in (dict,) or (isinstance(value, Mapping) and type(value).__module__ in ("types", "collections")):
        return {_key(k): _plain(v, defaults) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, defaults) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(v, defaults) for v in value), key=repr)
    return f"<{type(value).__module__}.{type(value).__qualname__}>"


def _key(key: object) -> object:
    return key if isinstance(key, (str, int)) else str(key)


def _name(value: Any) -> str:
    """`module:attr` of a class or function."""
    module, name = getattr(value, "__module__", None), value.__qualname__
    return f"<{name}>" if module is None or "<" in name else f"{module}:{name}"


def _flat(value: object, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping) and (value or not keys):
        for key, child in value.items():
            yield from _flat(child, (*keys, str(key)))
    else:
        yield keys, value


def _same(left: object, right: object) -> bool:
    return type(left) is type(right) and bool(left == right or (left != left and right != right))


def _yaml_lines(config: object, docs: bool, defaults: bool, indent: str) -> Iterator[str]:
    """One mapping, field by field, so that comments can stand above the fields."""
    from nemo_rl_core.schema.field_docs import field_docs

    notes = field_docs(type(config)) if docs else {}
    for name, plain in to_dict(config, defaults=defaults).items():
        if notes.get(name):
            yield from _comment(notes[name], indent)
        value = getattr(config, name)
        if isinstance(plain, dict) and plain and attrs.has(type(value)) and not isinstance(value, ComponentChoice):
            yield f"{indent}{name}:"
            yield from _yaml_lines(value, docs, defaults, indent + "  ")
        else:
            for line in _dump({name: plain}).removesuffix("\n").split("\n"):
                yield indent + line


def _comment(doc: str, indent: str) -> Iterator[str]:
    import textwrap

    for line in textwrap.wrap(doc, width=max(40, 110 - len(indent)), break_long_words=False):
        yield f"{indent}# {line}"


def _dump(value: object) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes text that either YAML 1.1 or 1.2 would read as something else."""

        def ignore_aliases(self, data: object) -> bool:
            return True

    def text_node(dumper: Dumper, text: str) -> yaml.ScalarNode:
        # Unicode's other line breaks would be folded; escaped they survive.
        style = '"' if any(mark in text for mark in "\x85\u2028\u2029\r") else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, text_node)
    Dumper.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+\Z"), list("-+0123456789")
    )
    Dumper.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\.[0-9]+(?:[eE][-+]?[0-9]+)?\Z"), list("-+.")
    )
    Dumper.add_implicit_resolver(
        "tag:yaml.org,2002:int", re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+)\Z"), list("-+0123456789")
    )
    text: str = yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text
