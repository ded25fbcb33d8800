"""Something reads every setting of the core and of each package.

Names are compared: two settings of one name count as one. A setting of a package counts as read by its package too if
its name stands in a string there, such as in a list of names that are passed on to a library.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import attrs
import pytest

from nemo_rl_core import schema
from nemo_rl_core.registry import KINDS, get_registry
from nemo_rl_core.schema.fields import config_class_of, fields_of

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "nemo_rl_core"
PLUGINS = {
    path.name: path
    for pattern in ("plugins/*/src/*", "plugins/*/*/src/*", "nemo_rl_plugins_*/src/*")
    for path in ROOT.glob(pattern)
}
CLASSES = [c for c in (getattr(schema, name) for name in schema.__all__) if isinstance(c, type) and attrs.has(c)]


def attributes_read(source: str) -> set[str]:
    """Names read as attributes, and those given to `getattr`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "getattr":
            found.update(a.value for a in node.args[1:2] if isinstance(a, ast.Constant))
    return found


def strings(source: str) -> set[str]:
    return {n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


@cache
def sources(folder: Path) -> list[str]:
    return [p.read_text("utf-8") for p in folder.rglob("*.py") if "testing" not in p.parts]


@cache
def read_in(folder: Path, *, by_name: bool = False) -> set[str]:
    return set().union(*(attributes_read(s) | (strings(s) if by_name else set()) for s in sources(folder)))


def nested(config_class: type) -> Iterator[type]:
    """A class of settings and those of its fields."""
    yield config_class
    for f in fields_of(config_class):
        inner = config_class_of(f.type)
        if inner is not None and attrs.has(inner):
            yield from nested(inner)


def of_core(config_class: type) -> set[str]:
    """Settings that a class has from the core, where the whole product reads them."""
    bases = (
        base for base in config_class.__mro__[1:] if attrs.has(base) and base.__module__.startswith("nemo_rl_core")
    )
    return {f.name for base in bases for f in attrs.fields(base)}


def plugin_classes() -> set[type]:
    """The settings of everything that is installed and made here, without those of the core."""
    refs = [ref for kind in KINDS for ref in get_registry().entries(kind) if ref.state != "broken"]
    roots = [c for ref in refs if (c := ref.config_class()) is not None and attrs.has(c)]
    return {c for root in roots for c in nested(root) if c.__module__.partition(".")[0] in PLUGINS}


def test_something_reads_every_setting_of_the_core():
    read = read_in(CORE).union(*map(read_in, PLUGINS.values()))
    settings = {f"{c.__name__}.{f.name}" for c in CLASSES for f in attrs.fields(c)}
    unread = sorted(setting for setting in settings if setting.partition(".")[2] not in read)
    assert len(settings) > 100 and not unread, f"nothing reads {unread}: make them work, or remove them"


def test_something_reads_every_setting_of_a_package():
    classes, unread, core = plugin_classes(), [], read_in(CORE)
    for config_class in classes:
        read = read_in(PLUGINS[config_class.__module__.partition(".")[0]], by_name=True) | core
        for f in fields_of(config_class):
            if f.name in of_core(config_class) or f.metadata.get("shorthand_for"):  # which sets what another name reads
                continue
            if f.name not in read:
                unread.append(f"{config_class.__qualname__}.{f.name}")
    assert len(classes) > 30 and not unread, f"nothing reads {unread}: make them work, or remove them"


def test_a_field_that_is_only_declared_or_set_is_not_read():
    assert attributes_read("class A:\n    x: int = 0\na.x = 1\nb.y\ngetattr(c, 'z')") == {"y", "z"}


@pytest.mark.parametrize("source", ["('limit', 'x')", "call(name='limit')"])
def test_a_name_in_a_string_is_found(source):
    assert "limit" in strings(source)
