"""How far the types reach: bare `Any` is counted, and may only become rarer."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "nemo_rl_core"
PLUGIN_SOURCES = sorted(
    [*ROOT.glob("plugins/*/src"), *ROOT.glob("plugins/*/*/src"), *ROOT.glob("nemo_rl_plugins_*/src")]
)

MOST_IN_ALL = 1029
"""Bare `Any` in all packages. Lower it with the count; a change that needs more has lost a type."""
MOST_IN_THE_CORE = 723


def annotations(tree: ast.AST) -> Iterator[ast.expr]:
    """Every annotation of a parameter, a result, an attribute or a variable."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            yield node.returns


def bare_any(source: str) -> int:
    """Annotations that say nothing: `Any` alone, also in quotes or as one of several."""
    count = 0
    for annotation in annotations(ast.parse(source)):
        parts = [annotation]
        while parts:
            part = parts.pop()
            if isinstance(part, ast.BinOp):
                parts += [part.left, part.right]
            count += ast.unparse(part).strip("'\"") == "Any"
    return count


def in_folder(folder: Path) -> int:
    return sum(bare_any(path.read_text(encoding="utf-8")) for path in folder.rglob("*.py"))


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("def f(a: Any, *args: Any, **kwargs: Any) -> Any: ...", 4),
        ("x: Any = 1\nclass C:\n    y: 'Any'", 2),
        ("def f(a: Any | None) -> None: ...", 1),
        ("def f(a: dict[str, Any]) -> list[Any]: ...", 0),
        ("x = Any", 0),
    ],
)
def test_bare_any_is_seen(source, count):
    assert bare_any(source) == count


def test_bare_any_becomes_rarer():
    core = in_folder(CORE)
    everywhere = core + sum(map(in_folder, PLUGIN_SOURCES))
    assert core <= MOST_IN_THE_CORE and everywhere <= MOST_IN_ALL, (core, everywhere)


def test_every_package_is_checked_and_says_so():
    packages = {p for source in PLUGIN_SOURCES for p in source.iterdir() if (p / "__init__.py").is_file()}
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["packages"]
    assert set(checked) == {"nemo_rl_core", *(p.name for p in packages)}
    assert [p.name for p in packages if not (p / "py.typed").is_file()] == []
