"""How much of the code is typed and how many functions on tensors state shapes: the numbers only get better.

A limit that is no longer reached is lowered to the number found. Every counter is first shown a small source.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "nemo_rl_core"
PLUGIN_SOURCES = sorted(
    [*ROOT.glob("plugins/*/src"), *ROOT.glob("plugins/*/*/src"), *ROOT.glob("nemo_rl_plugins_*/src")]
)

MAX_BARE_ANY = 300
MAX_BARE_ANY_PER_1000_LINES_OF_CORE = 6
MIN_SHARE_WITH_SHAPES = 0.95

SHORT_HELPER_LINES = 5
"""A private function of fewer lines may leave its shapes to its caller."""

_SHAPE = re.compile(r"\[(?:\s*[A-Za-z0-9_.*+/() -]{1,24}\s*(?:,\s*|(?=\])))*\]")
"""Such as [], [B, T], [N] or [num_layers, H]."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: Path) -> list[str]:
    files = [path for folder in folders for path in sorted(folder.rglob("*.py")) if "templates" not in path.parts]
    return [path.read_text(encoding="utf-8") for path in files]


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def parameter_annotations(function: Function) -> list[ast.expr | None]:
    a = function.args
    named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *(arg for arg in (a.vararg, a.kwarg) if arg)]
    return [arg.annotation for arg in named]


def bare_any(source: str) -> int:
    """Annotations of a parameter, result, attribute or variable that say `Any` and no more."""
    tree = ast.parse(source)
    annotations: list[ast.expr | None] = [n.annotation for n in ast.walk(tree) if isinstance(n, ast.AnnAssign)]
    for function in functions(tree):
        annotations += [*parameter_annotations(function), function.returns]
    return sum(a is not None and ast.unparse(a) in ("Any", "typing.Any", "'Any'") for a in annotations)


def states_shapes(source: str) -> dict[str, bool]:
    """For each function with a Tensor in its signature, whether its docstring states a shape in brackets."""
    found: dict[str, bool] = {}
    for function in functions(ast.parse(source)):
        signature = [*parameter_annotations(function), function.returns]
        takes_tensors = any(a is not None and re.search(r"\bTensor\b", ast.unparse(a)) for a in signature)
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        short_helper = function.name.startswith("_") and lines < SHORT_HELPER_LINES
        if takes_tensors and not short_helper:
            found[f"{function.name}:{function.lineno}"] = bool(_SHAPE.search(ast.get_docstring(function) or ""))
    return found


def all_states() -> list[bool]:
    return [stated for source in sources(CORE, *PLUGIN_SOURCES) for stated in states_shapes(source).values()]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(a: Any, *args: Any, b: int = 1, **kwargs: Any) -> Any: ...", 4),
        ("class C:\n    a: Any = None\n    async def f(self, b: typing.Any): ...", 2),
        ("def f(a: Mapping[str, Any], b: Any | None) -> list[Any]: ...", 0),
        ("def f(a: object) -> None:\n    b: 'Any' = a", 1),
    ],
)
def test_bare_any_is_counted(source: str, expected: int) -> None:
    assert bare_any(source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('def f(a: Tensor):\n    """Sums [B, T]."""', [True]),
        ('def f(a) -> torch.Tensor:\n    """Returns [] of it."""', [True]),
        ('def f(a: dict[str, Tensor]):\n    """Sums all."""', [False]),
        ("def f(a: Tensor):\n    return a", [False]),
        ("def _f(a: Tensor):\n    return a", []),
        ('def _f(a: Tensor):\n    """Sums.\n\n    Really.\n    """\n    return a', [False]),
        ("def f(a: TensorParallel): ...", []),
    ],
)
def test_stated_shapes_are_counted(source: str, expected: list[bool]) -> None:
    assert list(states_shapes(source).values()) == expected


def test_bare_any_does_not_spread() -> None:
    found = sum(map(bare_any, sources(CORE, *PLUGIN_SOURCES)))
    assert found <= MAX_BARE_ANY, f"{found} annotations are a bare Any, {MAX_BARE_ANY} before. Name the type instead."


def test_bare_any_does_not_spread_in_the_core() -> None:
    core = sources(CORE)
    found = 1000 * sum(map(bare_any, core)) / sum(source.count("\n") for source in core)
    assert found <= MAX_BARE_ANY_PER_1000_LINES_OF_CORE, (
        f"{found:.2f} annotations per 1,000 lines of the core are a bare Any, "
        f"{MAX_BARE_ANY_PER_1000_LINES_OF_CORE} before. Name the type instead."
    )


def test_functions_on_tensors_state_shapes() -> None:
    states = all_states()
    share = sum(states) / len(states)
    assert share >= MIN_SHARE_WITH_SHAPES, (
        f"{sum(states)} of {len(states)} functions on tensors state shapes ({share:.1%}), "
        f"{MIN_SHARE_WITH_SHAPES:.1%} before. State them in the docstring, such as [B, T]."
    )


def test_every_package_is_checked_and_says_so() -> None:
    packages = {p for source in PLUGIN_SOURCES for p in source.iterdir() if (p / "__init__.py").is_file()}
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["packages"]
    assert set(checked) == {"nemo_rl_core", *(p.name for p in packages)}
    assert [p.name for p in packages if not (p / "py.typed").is_file()] == []
