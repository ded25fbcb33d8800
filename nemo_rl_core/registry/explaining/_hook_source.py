"""Which hooks a plugin implements, read from its source: nothing of it is imported."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator

from nemo_rl_core.registry.discovery._declared import module_file

__all__ = ["implemented_hooks"]

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def implemented_hooks(value: str) -> list[str] | None:
    """Names of the hooks that the module or object of an entry point implements.

    Args:
        value: `module`, or `module:attr` with a class or an object made by one of its module.

    Returns:
        Sorted names; None if the source cannot be found or read.
    """
    from nemo_rl_core.registry._hooks import SPECS

    module, _, attribute = value.partition(":")
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        path = module_file(module)
        if path is not None:
            tree = ast.parse(path.read_bytes())
            body = tree.body if not attribute else _body_of(tree, attribute)
            names = {name for node in body if isinstance(node, _Function) for name in _names(node)}
            return sorted(names & SPECS.keys())
    return None


def _body_of(tree: ast.Module, name: str) -> Iterator[ast.stmt]:
    """The statements of a class, or of the class of an object, and of its bases in the same module."""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
            targets = {target.id for target in node.targets if isinstance(target, ast.Name)}
            name = node.value.func.id if name in targets else name
    left, seen = [name], set()
    while left:
        found = classes.get(left.pop())
        if found is not None and found.name not in seen:
            seen.add(found.name)
            yield from found.body
            left += [base.id for base in found.bases if isinstance(base, ast.Name)]


def _names(function: _Function) -> Iterator[str]:
    """The function's own name, or the hook that its decorator says."""
    said = [
        keyword.value.value
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Call)
        for keyword in decorator.keywords
        if keyword.arg == "specname" and isinstance(keyword.value, ast.Constant)
    ]
    yield from (str(name) for name in said or [function.name])
