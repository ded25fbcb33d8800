"""A component's configuration class as rows: name, type, default, meaning."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from typing import Any

import attrs

__all__ = ["config_rows"]


def config_rows(config_class: Any, *, without: Any = None, prefix: str = "") -> list[dict[str, str]]:
    """One row per field, nested attrs classes with dotted names.

    Args:
        config_class: An attrs class; anything else has no rows.
        without: Fields that this attrs class has too are left out.
        prefix: Put before each name.
    """
    if not (isinstance(config_class, type) and attrs.has(config_class)):
        return []
    shared = {f.name for f in attrs.fields(without)} if without is not None else set()
    attrs.resolve_types(config_class, include_extras=False)
    docs = _field_docs(config_class)
    rows: list[dict[str, str]] = []
    for field in attrs.fields(config_class):
        if field.name in shared:
            continue
        name = prefix + field.name
        if isinstance(field.type, type) and attrs.has(field.type) and not field.metadata.get("kind"):
            rows += config_rows(field.type, prefix=f"{name}.")
            continue
        rows.append(
            {
                "name": name,
                "type": _type_name(field.type),
                "default": _default(field),
                "description": docs.get(field.name, ""),
            }
        )
    return rows


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not getattr(annotation, "__args__", None):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("NoneType", "None")


def _default(field: Any) -> str:
    if field.default is attrs.NOTHING:
        return "required"
    if isinstance(field.default, attrs.Factory):  # type: ignore[arg-type]
        return "..." if field.default.takes_self else repr(field.default.factory())
    return repr(field.default)


def _field_docs(cls: type) -> dict[str, str]:
    """The string that stands below each field in the source, first sub-class first."""
    docs: dict[str, str] = {}
    for base in cls.__mro__:
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue
        statements = getattr(body, "body", [])
        for field, below in itertools.pairwise(statements):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and _is_text(below):
                docs.setdefault(field.target.id, " ".join(below.value.value.split()))
    return docs


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
