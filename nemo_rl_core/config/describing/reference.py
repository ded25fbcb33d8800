"""Descriptions of configuration classes: rows for the reference, and a JSON Schema."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import attrs
from attrs import frozen

from nemo_rl_core.config.describing.dump import to_dict
from nemo_rl_core.config.structure import allowed_values
from nemo_rl_core.schema import ComponentChoice
from nemo_rl_core.schema.field_docs import field_docs
from nemo_rl_core.schema.fields import alternatives, config_class_of, default_of, fields_of, type_name
from nemo_rl_core.schema.validators import choices, limits

__all__ = ["FieldRow", "describe", "json_schema"]


@frozen(kw_only=True)
class FieldRow:
    """One setting, as the reference shows it."""

    path: str
    type: str
    """In words, such as `integer or null`."""
    default: object
    """Plain data; "(required)" if there is none."""
    allowed: str
    """Type with choices or range, such as `integer >= 1`."""
    unit: str | None
    """Of "seconds", "tokens", "steps", None."""
    doc: str
    """The docstring under the field."""


def describe(cls: type, *, prefix: str = "") -> list[FieldRow]:
    """The settings of a class and of the classes inside it, in the order of their definition."""
    rows: list[FieldRow] = []
    docs = field_docs(cls)
    for f in fields_of(cls):
        path = f"{prefix}{f.name}"
        nested = config_class_of(f.type)
        if nested is not None and nested is not ComponentChoice and default_of(f) is not None:
            rows += describe(nested, prefix=f"{path}.")
            continue
        rows.append(
            FieldRow(
                path=path,
                type=_type(f),
                default=_default(f),
                allowed=_type(f) if "kind" in f.metadata else allowed_values(f),
                unit=_unit(f.name),
                doc=docs.get(f.name, ""),
            )
        )
        if nested is not None and nested is not ComponentChoice:
            rows += describe(nested, prefix=f"{path}.")
    return rows


def json_schema(cls: type) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a configuration class, for editors that complete and check YAML."""
    schema = _object(cls)
    schema["properties"] = {
        "extends": {
            "description": "File or files to start from, relative to this one.",
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        },
        **schema["properties"],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": cls.__name__, **schema}


def _type(f: attrs.Attribute[Any]) -> str:
    kind = f.metadata.get("kind")
    if kind is None:
        return type_name(f.type)
    word = kind.replace("_", " ")
    return f"list of {word}" if get_origin(f.type) is tuple else f"one of the {word}"


def _default(f: attrs.Attribute[Any]) -> object:
    if f.default is attrs.NOTHING:
        return "(required)"
    default = default_of(f)
    if default is attrs.NOTHING:
        return "(derived)"
    return _plain(default)


def _plain(value: object) -> object:
    if isinstance(value, ComponentChoice):
        return value.name
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, enum.Enum):
        return value.value
    return to_dict(value) if attrs.has(type(value)) else value


def _unit(name: str) -> str | None:
    if name.endswith("_s"):
        return "seconds"
    words = name.split("_")
    if "tokens" in words or name == "max_sequence_length":
        return "tokens"
    return "steps" if words[-1] == "steps" else None


def _object(cls: type) -> dict[str, Any]:
    docs = field_docs(cls)
    properties: dict[str, Any] = {}
    for f in fields_of(cls):
        schema = _component(f) if "kind" in f.metadata else _schema(f.type)
        if docs.get(f.name):
            schema = {"description": docs[f.name], **schema}
        _restrict(schema, f)
        default = _default(f)
        if default not in ("(required)", "(derived)"):
            schema["default"] = default
        properties[f.name] = schema
    result: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": properties}
    required = [f.name for f in fields_of(cls) if f.default is attrs.NOTHING]
    return {**result, "required": required} if required else result


def _component(f: attrs.Attribute[Any]) -> dict[str, Any]:
    named = {
        "type": "object",
        "additionalProperties": False,
        "properties": {"name": {"type": ["string", "null"]}, "options": {"type": "object"}},
    }
    one: dict[str, Any] = {"anyOf": [{"type": ["string", "null"]}, named]}
    return {"type": "array", "items": one} if get_origin(f.type) is tuple else one


_SIMPLE = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}


def _schema(tp: object) -> dict[str, Any]:
    if tp in _SIMPLE:
        return {"type": _SIMPLE[tp]}
    arms = alternatives(tp)
    if len(arms) > 1:
        return {"anyOf": [_schema(arm) for arm in arms]}
    origin, args = get_origin(tp), get_args(tp)
    if origin is Literal:
        return {"enum": list(args)}
    base = origin or tp
    if not isinstance(base, type):
        return {}
    if attrs.has(base):
        return _object(base)
    if issubclass(base, enum.Enum):
        return {"enum": [member.value for member in base]}
    if issubclass(base, Mapping):
        return {"type": "object", "additionalProperties": _schema(args[1])} if args else {"type": "object"}
    if issubclass(base, tuple) and args and args[-1] is not Ellipsis:
        items = [_schema(a) for a in args]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if issubclass(base, (list, tuple, set, frozenset)):
        return {"type": "array", "items": _schema(args[0]) if args else {}}
    return {}


_KEYWORDS = {">=": "minimum", ">": "exclusiveMinimum", "<=": "maximum", "<": "exclusiveMaximum"}


def _restrict(schema: dict[str, Any], f: attrs.Attribute[Any]) -> None:
    """Add the range and choices of the validator, to the numeric arm of an `anyOf` too."""
    options = choices(f.validator)
    if options is not None:
        schema["enum"] = list(options)
    bounds = {_KEYWORDS[op]: bound for op, bound in limits(f.validator)}
    for arm in [schema, *schema.get("anyOf", [])]:
        if arm.get("type") in ("integer", "number"):
            arm.update(bounds)
