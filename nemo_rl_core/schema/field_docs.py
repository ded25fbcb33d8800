"""Documentation of fields: the docstring under each, read from the source."""

from __future__ import annotations

import ast
import inspect
from functools import cache

__all__ = ["field_docs"]


def field_docs(cls: object) -> dict[str, str]:
    """Map each field, inherited ones included, to the docstring under it as one line.

    The result is empty if there is no source, as for classes typed into an interpreter.
    """
    return _field_docs(cls)


@cache
def _field_docs(cls: type) -> dict[str, str]:
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        docs.update(_own_docs(base))
    return docs


def _own_docs(cls: type) -> dict[str, str]:
    try:
        file = inspect.getsourcefile(cls)
    except TypeError:  # built in
        return {}
    node = _classes(file).get(cls.__qualname__.replace("<locals>.", "")) if file else None
    docs: dict[str, str] = {}
    for statement, after in zip(node.body, node.body[1:], strict=False) if node else ():
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            docs[statement.target.id] = " ".join(after.value.value.split())
    return docs


@cache
def _classes(file: str) -> dict[str, ast.ClassDef]:
    """Return the classes of a source file by qualified name."""
    try:
        with open(file, encoding="utf-8") as stream:
            tree = ast.parse(stream.read())
    except (OSError, SyntaxError, ValueError):
        return {}
    classes: dict[str, ast.ClassDef] = {}

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                name = f"{prefix}{child.name}."
                if isinstance(child, ast.ClassDef):
                    classes[f"{prefix}{child.name}"] = child
            walk(child, name)

    walk(tree, "")
    return classes
