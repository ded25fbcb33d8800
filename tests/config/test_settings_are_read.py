"""Something reads every setting of the core. Names are compared: two settings of one name count as one."""

from __future__ import annotations

import ast
from pathlib import Path

import attrs
import pytest

from nemo_rl_core import schema

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / "nemo_rl_core", *ROOT.glob("plugins/*/*/src"), *ROOT.glob("nemo_rl_plugins_*/src")]
CLASSES = [c for c in (getattr(schema, name) for name in schema.__all__) if isinstance(c, type) and attrs.has(c)]
SETTINGS = sorted({f"{c.__name__}.{f.name}" for c in CLASSES for f in attrs.fields(c)})


def attributes_read(source: str) -> set[str]:
    """Names read as attributes, and those given to `getattr`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "getattr":
            found.update(a.value for a in node.args[1:2] if isinstance(a, ast.Constant))
    return found


SOURCES = [p for folder in FOLDERS for p in folder.rglob("*.py") if "testing" not in p.parts]
READ = set().union(*(attributes_read(p.read_text("utf-8")) for p in SOURCES))


@pytest.mark.parametrize("setting", SETTINGS)
def test_something_reads_it(setting):
    name = setting.partition(".")[2]
    assert name in READ, f"nothing reads {setting}: make it work, or remove it"


def test_a_field_that_is_only_declared_or_set_is_not_read():
    assert attributes_read("class A:\n    x: int = 0\na.x = 1\nb.y\ngetattr(c, 'z')") == {"y", "z"}
