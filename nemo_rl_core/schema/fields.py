"""Fields and types of configuration classes."""

from __future__ import annotations

import types
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

import attrs

from nemo_rl_core.errors import ConfigError

__all__ = ["alternatives", "config_class_of", "default_of", "fields_of", "same", "shorthands", "type_name"]


def fields_of(cls: object) -> tuple[attrs.Attribute[Any], ...]:
    """Return the fields of an attrs class that its constructor takes, with annotations resolved."""
    return _fields_of(cls)


@cache
def _fields_of(cls: Any) -> tuple[attrs.Attribute[Any], ...]:
    try:
        attrs.resolve_types(cls)
    except (NameError, AttributeError) as error:
        raise ConfigError(
            f"The annotations of {cls.__module__}.{cls.__qualname__} cannot be resolved: {error}. "
            "Import the types of its fields outside of `if TYPE_CHECKING:`."
        ) from error
    return tuple(f for f in attrs.fields(cls) if f.init)


def alternatives(tp: object) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself if it is no union."""
    return get_args(tp) if get_origin(tp) in (Union, types.UnionType) else (tp,)


def config_class_of(tp: object) -> type | None:
    """Return the attrs class in a field's type, such as `X` in `X | None`; None unless there is exactly one."""
    classes = [arm for arm in alternatives(tp) if isinstance(arm, type) and attrs.has(arm)]
    return classes[0] if len(classes) == 1 else None


def shorthands(cls: object) -> dict[str, tuple[str, ...]]:
    """Map the name of each shorthand field to the path of the value that it sets."""
    named = ((f.name, f.metadata.get("shorthand_for")) for f in fields_of(cls))
    return {name: tuple(long.split(".")) for name, long in named if long}


def default_of(attribute: attrs.Attribute[Any]) -> object:
    """Return the default value; `attrs.NOTHING` if there is none or it depends on the object."""
    default: Any = attribute.default
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return attrs.NOTHING if default.takes_self else default.factory()
    return default


def same(left: object, right: object) -> bool:
    """Compare two values, arrays and tables included, whose `==` returns another array."""
    if left is right:
        return True
    try:
        return bool(left == right)
    except (ValueError, TypeError, RuntimeError):
        return False


def type_name(tp: object) -> str:
    """Describe a type in words that a reader of YAML knows: `integer or null`, `list of text`."""
    if tp is Any:
        return "anything"
    arms = alternatives(tp)
    if len(arms) > 1:
        return " or ".join(type_name(arm) for arm in arms)
    origin, args = get_origin(tp), get_args(tp)
    if origin is Literal:
        return "one of " + ", ".join(_plain(a) for a in args)
    if origin is tuple and args and args[-1] is not Ellipsis:
        return f"list of {len(args)} ({', '.join(type_name(a) for a in args)})"
    base = origin or tp
    if isinstance(base, type):
        if base in _NAMES:
            return _NAMES[base]
        if issubclass(base, dict):
            return f"mapping of text to {type_name(args[1])}" if args else "mapping"
        if issubclass(base, (list, tuple, set, frozenset)):
            return f"list of {type_name(args[0])}" if args else "list"
        if base.__name__ == "ComponentChoice":
            return "component"
        return str(base.__name__)
    return str(tp).replace("typing.", "").replace("collections.abc.", "")


def _plain(value: object) -> str:
    return str(value) if isinstance(value, str) else "null" if value is None else str(value).lower()


_NAMES: dict[Any, str] = {
    int: "integer",
    float: "number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}
