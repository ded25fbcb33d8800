"""What the source of a plugin declares, read without importing it: its `config_class`."""

from __future__ import annotations

import ast
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["declared_config_class", "module_file"]

_ATTRIBUTE = "config_class"
_MAX_STEPS = 20
"""Modules and base classes that are followed to a declaration."""


def declared_config_class(value: str) -> str | None:
    """Where the options class of a component lives, if that can be told from the source of the component.

    The class body, then its bases from left to right, also those of other modules, are searched for
    `config_class = <Name>`, where the name is imported at the top of that module.

    Args:
        value: `module:attr` of a class.

    Returns:
        `module:attr` of the options class; None where only an import can tell, such as for a class that a function
        makes.
    """
    module, _, name = value.partition(":")
    with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError):
        return _Search().class_of(module, name)
    return None


def module_file(module: str) -> Path | None:
    """The file of a module. Its packages are looked at too, but not imported."""
    where: Sequence[str] | None = None
    name, spec = "", None
    for part in module.split("."):
        name = f"{name}.{part}".lstrip(".")
        finders = (f for f in sys.meta_path if hasattr(f, "find_spec"))
        spec = next((found for f in finders if (found := f.find_spec(name, where)) is not None), None)
        if spec is None:
            return None
        where = spec.submodule_search_locations
    return None if spec is None or not (spec.origin or "").endswith(".py") else Path(str(spec.origin))


class _Search:
    """One search; it ends after a number of steps, so that bases in a circle do no harm."""

    def __init__(self) -> None:
        self._left = _MAX_STEPS

    def class_of(self, module: str, name: str) -> str | None:
        """The declaration that a class has or inherits."""
        self._left -= 1
        path = module_file(module) if self._left >= 0 else None
        if path is None:
            return None
        tree = ast.parse(path.read_bytes())
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        imported = dict(_imports(tree, package))
        node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
        if node is None:
            return self.class_of(*imported[name]) if name in imported else None
        if node.keywords:  # a metaclass may do anything
            return None
        for statement in node.body:
            said = _assigned(statement)
            if said is not None:
                return ":".join(imported[said]) if said in imported else None
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if not isinstance(base, ast.Name):
                return None
            found = self.class_of(*imported.get(base.id, (module, base.id)))
            if found is not None:
                return found
        return None


def _assigned(statement: ast.stmt) -> str | None:
    """The name that a statement assigns to `config_class`; "" for another expression."""
    if isinstance(statement, ast.AnnAssign):
        targets: list[ast.expr] = [statement.target]
        assigned = statement.value
    elif isinstance(statement, ast.Assign):
        targets, assigned = statement.targets, statement.value
    else:
        return None
    if assigned is None or not any(isinstance(target, ast.Name) and target.id == _ATTRIBUTE for target in targets):
        return None
    return assigned.id if isinstance(assigned, ast.Name) else ""


def _imports(tree: ast.Module, package: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Names that a module imports from others when it is imported: name, and (module, name there)."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                yield alias.asname or alias.name, (module, alias.name)
