"""The architecture page names files and definitions that exist, and its walks are short and go one way."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "about" / "architecture-overview.md"
PROMPT = "From a prompt to a refit"
KEY = "From a configuration key to the code that reads it"
TABLE = "Where do I add ..."
MAIN_ROOMS = ("data", "rollouts", "training")

_ITEM = re.compile(r"^\d+\. (.+?)(?=^\S|\Z)", flags=re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[`([^`]+)`\]\(([^)#]+)\)")
_NAME = re.compile(r"`([A-Za-z_]\w*(?:\.\w+)?)`")


@attrs.frozen
class Stop:
    """One file of a walk, and the functions and classes that its text names."""

    path: str
    names: tuple[str, ...]


def section(title: str) -> str:
    """The text of a section of the page, its sub-sections included."""
    (found,) = re.findall(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)",
        PAGE.read_text(encoding="utf-8"),
        flags=re.MULTILINE | re.DOTALL,
    )
    return str(found)


def stops(text: str) -> list[Stop]:
    """The files of a numbered list; dotted names in lower case are keys of a configuration, not definitions."""
    walk = []
    for item in _ITEM.findall(text):
        (path, target), *_ = _LINK.findall(item)
        assert (PAGE.parent / target).resolve() == (ROOT / path).resolve(), f"{path} links to {target}"
        names = [name for name in _NAME.findall(_LINK.sub("", item)) if "." not in name or name[0].isupper()]
        walk.append(Stop(path, tuple(dict.fromkeys(names))))
    return walk


def definitions(source: str) -> set[str]:
    """Functions and classes of a module, and the methods of its classes as `Class.method`."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    top = [node for node in ast.parse(source).body if isinstance(node, kinds)]
    classes = [node for node in top if isinstance(node, ast.ClassDef)]
    methods = {f"{c.name}.{node.name}" for c in classes for node in c.body if isinstance(node, kinds)}
    return {node.name for node in top} | methods


def undefined(stop: Stop) -> list[str]:
    source = (ROOT / stop.path).read_text(encoding="utf-8")
    return [name for name in stop.names if name not in definitions(source)]


def room_order() -> list[str]:
    """The rooms of the core, highest first, as the import contracts have them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = (c["layers"] for c in contracts if c["id"] == "core-layers")
    return [room.strip() for layer in layers for room in layer.split("|")]


def room_of(path: str) -> str | None:
    """The room that a file of the core is in; None for a file of a plugin."""
    folder, _, rest = path.partition("/")
    return rest.split("/")[0].removesuffix(".py") if folder == "nemo_rl_core" else None


def imported_rooms(source: str) -> set[str]:
    """Rooms of the core that a module imports anywhere, inside functions and for types too."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module or "")
    return {parts[1] for parts in (m.split(".") for m in modules) if parts[0] == "nemo_rl_core" and len(parts) > 1}


def uphill(walk: list[tuple[str, str]]) -> Iterator[str]:
    """Files, each with its source, that import a higher room which the walk reaches later."""
    order = room_order()
    for i, (path, source) in enumerate(walk):
        room = room_of(path)
        later = {reached for other, _ in walk[i + 1 :] if (reached := room_of(other)) is not None}
        # Plugins use the rooms from `infra` down, and no other.
        height = order.index("infra" if room is None else room)
        higher = {reached for reached in later if order.index(reached) < height}
        for reached in sorted(imported_rooms(source) & higher):
            yield f"{path} imports {reached}"


def test_the_walks_are_short() -> None:
    assert 10 <= len(stops(section(PROMPT))) <= 20
    assert 3 <= len(stops(section(KEY))) <= 5


@pytest.mark.parametrize("stop", [*stops(section(PROMPT)), *stops(section(KEY))], ids=lambda stop: stop.path)
def test_a_stop_names_what_its_file_defines(stop: Stop) -> None:
    assert stop.names, f"{stop.path}: name the function in which it happens"
    assert undefined(stop) == []


def test_a_name_that_is_not_defined_is_seen() -> None:
    (stop,) = stops(
        "1. [`nemo_rl_core/exports.py`](../../nemo_rl_core/exports.py): `lazy_exports`, `Gone.away`, `a.key`.\n"
    )
    assert undefined(stop) == ["Gone.away"]


def test_the_prompt_goes_downhill() -> None:
    walk = [(stop.path, (ROOT / stop.path).read_text(encoding="utf-8")) for stop in stops(section(PROMPT))]
    assert list(uphill(walk)) == []


def test_an_import_of_a_higher_room_is_seen() -> None:
    lazy = "def f() -> None:\n    from nemo_rl_core.training.run import run\n"
    data, plugin, loop = "nemo_rl_core/data/module.py", "plugins/backends/x/backend.py", "nemo_rl_core/training/loop.py"
    walk = [(data, lazy), (plugin, lazy), (loop, lazy)]
    assert list(uphill(walk)) == [f"{data} imports training", f"{plugin} imports training"]


def test_the_prompt_never_returns_to_a_room() -> None:
    rooms = [room for stop in stops(section(PROMPT)) if (room := room_of(stop.path)) in MAIN_ROOMS]
    entered = [room for room, before in zip(rooms, [None, *rooms], strict=False) if room != before]
    assert tuple(entered) == MAIN_ROOMS


def test_what_the_table_names_is_there() -> None:
    rows = [line for line in section(TABLE).splitlines() if line.startswith("| a")]
    assert {row.split("|")[1].strip() for row in rows} >= {
        "a loss",
        "an algorithm",
        "an environment",
        "a training backend",
        "a generation backend",
        "a command",
    }
    for name, target in (link for row in rows for link in _LINK.findall(row)):
        assert name in definitions((PAGE.parent / target).read_text(encoding="utf-8")), f"{target} defines no {name}"


def test_every_room_is_described() -> None:
    described = re.findall(r"^\| (`.*?) \|", section("The rooms of the core"), flags=re.MULTILINE)
    rooms = [room for cell in described for room in re.findall(r"`(\w+)`", cell)]
    assert rooms == [room for room in room_order() if (ROOT / "nemo_rl_core" / room).is_dir() or room == "hookspecs"]


def test_every_link_leads_somewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((\.\.?/[^)#]+)", text)
    generated = "../references/kinds/"
    assert [t for t in targets if not (PAGE.parent / t).exists() and not t.startswith(generated)] == []


def test_the_readme_leads_to_the_page_at_once() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:30])
    assert "docs/about/architecture-overview.md" in first_screen
