"""The rules that keep the core small: what it may import, name and contain.

Each rule is a function from source to a list of violations. Every function is first shown a source that
breaks its rule, so that a check that has stopped checking fails too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "nemo_rl_core"
PLUGIN_SOURCES = sorted(
    [*ROOT.glob("plugins/*/src"), *ROOT.glob("plugins/*/*/src"), *ROOT.glob("nemo_rl_plugins_*/src")]
)
SOURCE_FOLDERS = [CORE, *PLUGIN_SOURCES]
ENGINES = {"deepspeed", "flash_attn", "megatron", "ray", "sglang", "trl", "verl", "vllm"}
"""Libraries of which each belongs to one plugin, never to the core."""
MAX_LINES = 500


def python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def over(files: list[Path], rule: Callable[[str], list[str]]) -> list[str]:
    """Violations of `rule` in all files, each with its place."""
    return [f"{shown(path)}: {found}" for path in files for found in rule(path.read_text(encoding="utf-8"))]


def component_names() -> set[str]:
    """Names under which the shipped plugins register components."""
    names: set[str] = set()
    for file in (source.with_name("pyproject.toml") for source in PLUGIN_SOURCES):
        groups = tomllib.loads(file.read_text())["project"].get("entry-points", {})
        names |= {
            name
            for group, table in groups.items()
            if group.startswith("nemo_rl.") and group != "nemo_rl.hooks"
            for name in table
        }
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    return names - {name for table in core.values() for name in table}


# -- the core imports no implementation --------------------------------------------------------------------


def imports_of_implementations(source: str) -> list[str]:
    """Imports, lazy ones and those by a constant string too, of a plugin, the facade or an engine."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
            "find_spec",
        ):
            modules = [str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)]
        for module in modules:
            top = module.split(".")[0]
            if top in ENGINES or top == "nemo_rl" or top.startswith("nemo_rl_plugins"):
                found.append(f"line {node.lineno} imports {module}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import vllm",
        "def f():\n    from nemo_rl_plugins_grpo.loss import X",
        "if TYPE_CHECKING:\n    import ray.actor",
        "importlib.import_module('megatron.core')",
        "from nemo_rl import GRPOTrainer",
    ],
)
def test_an_import_of_an_implementation_is_seen(source: str) -> None:
    assert imports_of_implementations(source)


def test_other_imports_are_allowed() -> None:
    assert imports_of_implementations("import nemo_rl_core.data\nfrom . import x\nimport_module(name)") == []


def test_core_imports_no_implementation() -> None:
    assert over(python_files(CORE), imports_of_implementations) == []


# -- the core names no implementation ----------------------------------------------------------------------


def _decisive_strings(tree: ast.AST) -> Iterator[ast.Constant]:
    """String literals that a program decides by: compared, matched, dispatched on or taken as a default."""
    for node in ast.walk(tree):
        places: list[ast.AST | None] = []
        if isinstance(node, ast.Compare):
            places = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            places = [node.value]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            places = [*node.args.defaults, *node.args.kw_defaults]
        elif isinstance(node, ast.Dict):
            places = list(node.keys)
        elif isinstance(node, ast.keyword) and node.arg in ("default", "name", "backend"):
            places = [node.value]
        elif isinstance(node, ast.ClassDef):
            places = [s.value for s in node.body if isinstance(s, ast.AnnAssign | ast.Assign)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("startswith", "endswith", "get"):
            places = list(node.args)
        for place in places:
            if place is None:
                continue
            for inner in ast.walk(place):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    yield inner


def decisions_by_name(source: str, names: set[str]) -> list[str]:
    """Places where the code decides by the name of a shipped component."""
    found = {(c.lineno, str(c.value)) for c in _decisive_strings(ast.parse(source)) if c.value in names}
    return [f"line {line} decides by the name {name!r}" for line, name in sorted(found)]


@pytest.mark.parametrize(
    "source",
    [
        "if config.backend == 'dtensor': pass",
        "x = name in ('a', 'dtensor')",
        "match name:\n    case 'dtensor':\n        pass",
        "def f(backend='dtensor'): pass",
        "def f(*, backend='dtensor'): pass",
        "class C:\n    backend: str = 'dtensor'",
        "class C:\n    backend: str = field(default='dtensor')",
        "KINDS = {'dtensor': 1}",
        "x = names.get('dtensor')",
        "x = ComponentChoice(name='dtensor')",
    ],
)
def test_a_decision_by_name_is_seen(source: str) -> None:
    assert decisions_by_name(source, {"dtensor"})


def test_prose_and_other_strings_are_allowed() -> None:
    source = '"""Such as dtensor."""\nhelp = "dtensor"\nx == "other"\nprint("dtensor")\ndef f():\n    "dtensor"\n'
    assert decisions_by_name(source, {"dtensor"}) == []


def test_core_decides_by_no_component_name() -> None:
    names = component_names()
    assert {"grpo", "dtensor", "torch_engine"} <= names
    assert over(python_files(CORE), lambda source: decisions_by_name(source, names)) == []


# -- plugins import the core and themselves ----------------------------------------------------------------


def imports_of_other_plugins(source: str, own: str) -> list[str]:
    """Imports of a plugin package other than `own`, and of the facade."""
    found = imports_of_implementations(source)
    ours = [f for f in found if f.split(" imports ")[1].split(".")[0] == own]
    ours += [f for f in found if f.split(" imports ")[1].split(".")[0] in ENGINES]
    return [f for f in found if f not in ours]


def test_an_import_between_plugins_is_seen() -> None:
    source = "def f():\n    import nemo_rl_plugins_b.x\nimport nemo_rl_plugins_a.y\nimport nemo_rl"
    assert len(imports_of_other_plugins(source, "nemo_rl_plugins_a")) == 2


@pytest.mark.parametrize("folder", PLUGIN_SOURCES, ids=lambda p: p.parent.name)
def test_plugin_imports_no_other_plugin(folder: Path) -> None:
    (own,) = (p.name for p in folder.iterdir() if (p / "__init__.py").is_file())
    if own == "nemo_rl":
        pytest.skip("the facade may name the default set")
    assert over(python_files(folder), lambda source: imports_of_other_plugins(source, own)) == []


# -- size and names ----------------------------------------------------------------------------------------


def badly_named_file(path: Path) -> bool:
    """Files that are headed to hold everything."""
    return path.name in ("utils.py", "helpers.py", "misc.py", "common.py") or path.stem.endswith("_manager")


def badly_named_classes(source: str) -> list[str]:
    """Classes called Manager or Handler where a noun of the field would serve."""
    allowed = {"ResourceManager"}  # the requirements name it
    return [
        f"class {node.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Manager", "Handler")) and node.name not in allowed
    ]


def test_bad_names_are_seen() -> None:
    assert badly_named_file(Path("a/utils.py"))
    assert badly_named_file(Path("a/weight_manager.py"))
    assert not badly_named_file(Path("a/weights.py"))
    assert badly_named_classes("class CheckpointManager: pass") == ["class CheckpointManager"]
    assert badly_named_classes("class ResourceManager: pass\nclass Checkpoints: pass") == []


def test_files_and_classes_are_named_by_what_they_are() -> None:
    files = python_files(*SOURCE_FOLDERS)
    assert [shown(f) for f in files if badly_named_file(f)] == []
    assert over(files, badly_named_classes) == []


def too_long(source: str) -> list[str]:
    """The length of a file that passes the limit."""
    count = len(source.splitlines())
    return [f"{count} lines"] if count > MAX_LINES else []


def test_a_long_file_is_seen() -> None:
    assert too_long("x\n" * (MAX_LINES + 1)) == ["501 lines"]
    assert too_long("x\n" * MAX_LINES) == []


def test_no_file_is_longer_than_500_lines() -> None:
    folders = [ROOT / name for name in ("nemo_rl_core", "plugins", "tests", "benchmarks", "examples", "docs")]
    assert over(python_files(*(f for f in folders if f.is_dir())), too_long) == []


# -- rooms -------------------------------------------------------------------------------------------------

MAX_SIBLINGS = 16
ONE_PER_KIND = {"protocols", "conformance"}
"""Folders with a module for each kind of component."""


def crowded(folders: dict[str, int]) -> list[str]:
    """Folders with more modules side by side than one takes in at a glance."""
    return [f"{name}: {count} modules" for name, count in folders.items() if count > MAX_SIBLINGS]


def siblings(root: Path) -> dict[str, int]:
    """The number of modules of each folder; its `__init__` says what they have in common, and is not counted."""
    counts: dict[str, int] = {}
    for path in python_files(root):
        if path.name != "__init__.py" and "templates" not in path.parts and path.parent.name not in ONE_PER_KIND:
            counts[shown(path.parent)] = counts.get(shown(path.parent), 0) + 1
    return counts


def test_a_crowded_folder_is_seen() -> None:
    assert crowded({"a": 17, "b": 16}) == ["a: 17 modules"]


def test_no_folder_of_the_core_is_crowded() -> None:
    found = siblings(CORE)
    assert {"nemo_rl_core/rollouts", "nemo_rl_core/training/steps"} <= found.keys()
    assert crowded(found) == []


def test_contracts_of_imports_know_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    packages = {p.name for source in PLUGIN_SOURCES for p in source.iterdir() if (p / "__init__.py").is_file()}
    assert set(settings["root_packages"]) == {"nemo_rl_core", *packages}
    contracts = {contract["id"]: contract for contract in settings["contracts"]}
    assert set(contracts["core-names-no-implementation"]["forbidden_modules"]) >= packages
    assert set(contracts["plugins-are-independent"]["modules"]) == packages - {"nemo_rl"}
    assert set(contracts["plugins-do-not-import-the-facade"]["source_modules"]) == packages - {"nemo_rl"}
    assert set(contracts["no-circles"]["ancestors"]) == {"nemo_rl_core", *packages}


FAMILIES = {
    "algorithms",
    "backends",
    "cluster",
    "data",
    "environments",
    "integrations",
    "loggers",
    "sandboxes",
    "tools",
}


def test_every_package_lives_in_a_family() -> None:
    packages = [p.parent.relative_to(ROOT / "plugins") for p in ROOT.glob("plugins/**/pyproject.toml")]
    assert [str(p) for p in packages if str(p) != "nemo_rl" and (len(p.parts) != 2 or p.parts[0] not in FAMILIES)] == []


def test_the_readme_lists_every_package() -> None:
    rows = (ROOT / "README.md").read_text()
    files = [ROOT / "pyproject.toml", *(source.with_name("pyproject.toml") for source in PLUGIN_SOURCES)]
    places = {tomllib.loads(f.read_text())["project"]["name"]: shown(f.parent) for f in files}
    places["nemo-rl-core"] = "nemo_rl_core"
    assert [name for name, place in places.items() if f"| `{name}` | [`{place}" not in rows] == []


# -- public names ------------------------------------------------------------------------------------------


def _exported(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
            assert isinstance(node, ast.Assign)
            return list(ast.literal_eval(node.value))
    return None


def undocumented_names(source: str) -> list[str]:
    """What is wrong with the public face of a module: `__all__` and docstrings."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else ["no module docstring"]
    defined = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)}
    exported = _exported(tree)
    if exported is None:
        return found + (["no __all__"] if any(not name.startswith("_") for name in defined) else [])
    lazy = "__getattr__" in defined
    bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} | set(defined)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name) for alias in node.names}
    found += [f"__all__ names {name!r}, which is not there" for name in exported if name not in bound and not lazy]
    for name, node in defined.items():
        if name in exported and not ast.get_docstring(node):
            found.append(f"{name} has no docstring")
        # A hook specification is reached through its plugin manager, not by its name in the module.
        # So is a command of the command line, by its application.
        reached = any(re.match(r"hookspec|\w+\.(command|callback)\(", ast.unparse(d)) for d in node.decorator_list)
        if name not in exported and not name.startswith("_") and not reached:
            found.append(f"{name} is public and not in __all__")
    return found


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("x = 1", "no module docstring"),
        ('"""M."""\ndef f():\n    """F."""', "no __all__"),
        ('"""M."""\n__all__ = ["g"]', "'g'"),
        ('"""M."""\n__all__ = ["f"]\ndef f(): pass', "f has no docstring"),
        ('"""M."""\n__all__ = []\nclass C:\n    """C."""', "C is public"),
    ],
)
def test_an_undocumented_name_is_seen(source: str, complaint: str) -> None:
    assert any(complaint in found for found in undocumented_names(source))


def test_a_documented_module_passes() -> None:
    assert undocumented_names('"""M."""\n__all__ = ["f", "g"]\nfrom a import g\ndef f():\n    """F."""') == []


def test_public_names_are_listed_and_documented() -> None:
    public = [f for f in python_files(*SOURCE_FOLDERS) if not (f.name[0] == "_" and f.name != "__init__.py")]
    assert over(public, undocumented_names) == []


# -- import budgets ----------------------------------------------------------------------------------------

HEAVY = {"accelerate", "datasets", "numpy", "pandas", "pyarrow", "ray", "torch", "transformers"}
LIGHT_MODULES = [
    "nemo_rl_core",
    "nemo_rl_core.registry",
    "nemo_rl_core.config",
    "nemo_rl_core.schema.run",
    "nemo_rl_core.cli",
    "nemo_rl_core.hookspecs",
    *(f"nemo_rl_core.protocols.{p.stem}" for p in sorted((CORE / "protocols").glob("*.py")) if p.stem != "__init__"),
]


def loaded_by(*modules: str) -> set[str]:
    """Heavy packages in `sys.modules` after importing `modules` in a fresh process."""
    program = f"import sys, {', '.join(modules)}; print(*set({sorted(HEAVY)!r}) & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_a_heavy_import_is_seen() -> None:
    assert "numpy" in loaded_by("numpy")


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_light_module_loads_nothing_heavy(module: str) -> None:
    assert loaded_by(module) == set()


def test_discovery_loads_no_plugin() -> None:
    program = "import sys, nemo_rl_core.registry, nemo_rl_core.cli; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert [m for m in done.stdout.split() if m == "nemo_rl" or m.startswith("nemo_rl_plugins")] == []
