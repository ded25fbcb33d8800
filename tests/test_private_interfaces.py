"""What we use of other libraries though it is private: listed in each package's pyproject.toml, with versions."""

from __future__ import annotations

import ast
import platform
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PACKAGES = [
    ROOT / "pyproject.toml",
    *sorted(ROOT.glob("plugins/nemo_rl/pyproject.toml")),
    *sorted(ROOT.glob("plugins/*/*/pyproject.toml")),
    *sorted(ROOT.glob("nemo_rl_plugins_*/pyproject.toml")),
]
DOCUMENTED = {"_asdict", "_current_frames", "_exit", "_fields", "_make", "_replace"}
"""Public in Python's documentation in spite of their names."""


def sources(package: Path) -> list[Path]:
    folder = ROOT / "nemo_rl_core" if package.parent == ROOT else package.parent / "src"
    return [path for path in sorted(folder.rglob("*.py")) if "templates" not in path.parts]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def own_names(tree: ast.Module) -> Iterator[str]:
    """Names that a module of ours gives to something."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                yield name


@cache
def core_names() -> frozenset[str]:
    return frozenset(n for p in sources(PACKAGES[0]) for n in own_names(ast.parse(p.read_text(encoding="utf-8"))))


def foreign_roots(tree: ast.Module) -> Iterator[str]:
    """Names under which a module knows what others made."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and not (node.module or "").startswith("nemo_rl"):
            yield from (alias.asname or alias.name for alias in node.names)


def root_of(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def private_uses(tree: ast.Module, ours: set[str]) -> Iterator[tuple[str, int]]:
    """Private names of others: imported, reached from an import, or given by nobody in the package."""
    foreign = {name for name in foreign_roots(tree) if not name.startswith("nemo_rl")}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and not (node.module or "").startswith("nemo_rl"):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((part, node.lineno) for part in parts if is_private(part))
        elif (
            isinstance(node, ast.Attribute)
            and is_private(node.attr)
            and (node.attr not in ours or root_of(node.value) in foreign)
        ):
            yield node.attr, node.lineno


def listed(package: Path) -> dict[str, dict[str, object]]:
    tool = tomllib.loads(package.read_text(encoding="utf-8")).get("tool", {})
    return tool.get("nemo-rl", {}).get("private-interfaces", {})


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.parent.name)
def test_private_names_of_others_are_listed(package):
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources(package)}
    ours = core_names() | {name for tree in trees.values() for name in own_names(tree)}
    names = {name for row in listed(package).values() for name in row["names"]}
    found = {(name, f"{path.relative_to(ROOT)}:{n}") for path, t in trees.items() for name, n in private_uses(t, ours)}
    new = sorted(where for where in found if where[0] not in names)
    assert not new, f"use a public interface, or list them in {package.relative_to(ROOT)}: {new}"
    assert names == {name for name, _ in found}, "the list names what is no longer used"


@pytest.mark.parametrize("package", [p for p in PACKAGES if listed(p)], ids=lambda path: path.parent.name)
def test_what_is_installed_lies_in_the_versions_that_were_tried(package):
    for name, row in listed(package).items():
        try:
            found = platform.python_version() if name == "python" else version(name)
        except PackageNotFoundError:
            continue  # an engine that has an environment of its own
        allowed = SpecifierSet(row["versions"])
        assert allowed.contains(found, prereleases=True), f"{name} {found}: try {row['names']}, then widen {allowed}"


@pytest.mark.parametrize(
    "code",
    ["from ray._private import worker", "import torch\ntorch._new()", "import os\nos.path.x()._mine", "thing._unknown"],
)
def test_each_way_to_a_private_name_is_found(code):
    assert list(private_uses(ast.parse(code), {"_mine"}))
    assert not list(private_uses(ast.parse("import os\nself._mine\nos._exit(1)\nx.__name__"), {"_mine"}))
