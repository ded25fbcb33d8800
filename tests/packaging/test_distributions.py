"""Every distribution builds, says what it needs, and holds what its entry points name."""

from __future__ import annotations

import ast
import email
import json
import os
import re
import site
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = [pytest.mark.xdist_group("packaging"), pytest.mark.timeout(180)]

ROOT = Path(__file__).resolve().parents[2]
PROJECTS = [
    ROOT,
    *sorted(
        p.parent
        for pattern in ("plugins/*", "plugins/*/*", "nemo_rl_plugins_*")
        for p in ROOT.glob(f"{pattern}/pyproject.toml")
    ),
]
IDS = [p.name if p != ROOT else "core" for p in PROJECTS]


def project_table(project: Path) -> dict:
    return tomllib.loads((project / "pyproject.toml").read_text())["project"]


def source_folder(project: Path) -> Path:
    """The one import package of a distribution."""
    if project == ROOT:
        return ROOT / "nemo_rl_core"
    (package,) = (p for p in (project / "src").iterdir() if (p / "__init__.py").is_file())
    return package


class Built:
    """The sdist of a project and the wheel made from that sdist."""

    def __init__(self, folder: Path) -> None:
        (self.sdist,) = folder.glob("*.tar.gz")
        (self.wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(self.wheel) as archive:
            self.files = set(archive.namelist())
            (info,) = {name.split("/")[0] for name in self.files if ".dist-info/" in name}
            self.metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
            name = f"{info}/entry_points.txt"
            self.entry_points = archive.read(name).decode() if name in self.files else ""

    @property
    def requirements(self) -> list[Requirement]:
        return [Requirement(text) for text in self.metadata.get_all("Requires-Dist") or []]


def build(project: Path, out: Path) -> Built:
    """`python -m build`: an sdist, and a wheel from what that sdist holds and nothing else."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(project)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return Built(out)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Built]:
    folder = tmp_path_factory.mktemp("dist")
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda project: build(project, folder / (project.name or "core")), PROJECTS)
    return dict(zip(PROJECTS, results, strict=True))


@pytest.fixture(params=PROJECTS, ids=IDS)
def project(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_every_distribution_has_the_version_of_the_core(built: dict[Path, Built]) -> None:
    namespace: dict[str, str] = {}
    exec((ROOT / "nemo_rl_core" / "_version.py").read_text(), namespace)
    versions = {b.metadata["Name"]: b.metadata["Version"] for b in built.values()}
    assert len(versions) == len(PROJECTS)
    assert set(versions.values()) == {namespace["__version__"]}


def test_metadata_is_complete(built: dict[Path, Built], project: Path) -> None:
    found, table = built[project], project_table(project)
    assert found.metadata["Name"] == table["name"]
    assert found.metadata["License-Expression"] == "Apache-2.0"
    assert found.metadata["Requires-Python"] == ">=3.11"
    assert found.metadata["Summary"]
    assert found.metadata.get_payload().strip(), "the README is the long description"
    required = {str(r) for r in found.requirements if not (r.marker and "extra" in str(r.marker))}
    assert required == {str(Requirement(r)) for r in table["dependencies"]}


def test_wheel_holds_the_package_and_nothing_else(built: dict[Path, Built], project: Path) -> None:
    package = source_folder(project)
    files = built[project].files
    tops = {name.split("/")[0] for name in files if ".dist-info/" not in name}
    assert tops == {package.name}
    assert f"{package.name}/py.typed" in files
    assert not [n for n in files if ("/tests/" in n and "/templates/" not in n) or "__pycache__" in n]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in files)
    sources = {str(p.relative_to(package.parent)) for p in package.rglob("*.py")}
    assert sources <= files


def test_sdist_holds_only_its_own_project(built: dict[Path, Built], project: Path) -> None:
    with tarfile.open(built[project].sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"LICENSE", "README.md", "pyproject.toml", "PKG-INFO"} <= names
    top = "nemo_rl_core" if project == ROOT else "src"
    own = {"LICENSE", "README.md", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert not [name for name in names if name not in own and name.split("/")[0] != top]


def test_every_package_carries_the_same_full_license() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert [p for p in PROJECTS if (p / "LICENSE").read_text() != text] == []


# -- what is imported is declared ------------------------------------------------------------------------


def imported_names(source: str) -> Iterator[str]:
    """Top-level names of all imports of a module, lazy ones too, except those guarded by `except ImportError`."""
    tree = ast.parse(source)
    guarded: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h.type) for h in node.handlers if h.type):
            guarded.update(id(inner) for statement in node.body for inner in ast.walk(statement))
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def undeclared(project: Path, providers: dict[str, list[str]]) -> dict[str, str]:
    """Import name to the file that uses it, for every import that no declared dependency provides."""
    table = project_table(project)
    optional = [r for group in table.get("optional-dependencies", {}).values() for r in group]
    declared = {canonicalize_name(Requirement(r).name) for r in [*table["dependencies"], *optional, table["name"]]}
    package = source_folder(project)
    missing: dict[str, str] = {}
    for file in package.rglob("*.py"):
        for name in imported_names(file.read_text()):
            if name in sys.stdlib_module_names or name == package.name:
                continue
            if not declared & {canonicalize_name(d) for d in providers.get(name, [name.replace("_", "-")])}:
                missing[name] = str(file.relative_to(ROOT))
    return missing


def test_every_import_is_declared(project: Path) -> None:
    ours = {source_folder(p).name: [project_table(p)["name"]] for p in PROJECTS}
    assert undeclared(project, {**packages_distributions(), **ours}) == {}


def test_an_undeclared_import_is_found() -> None:
    source = "import os\ntry:\n    import wandb\nexcept ImportError:\n    pass\ndef f():\n    from pandas.io import x\n"
    assert list(imported_names(source)) == ["os", "pandas"]


# -- installed -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def python(built: dict[Path, Built], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with every wheel installed, above this one's third-party packages."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    wheels = [str(b.wheel) for b in built.values()]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run([*command, *wheels], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    installed = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # Folders named in a .pth file come after the environment's own, and their .pth files (where editable
    # installs live) are not read: the wheels are what is imported.
    below = dict.fromkeys(p for p in [*site.getsitepackages(), *sys.path] if p.endswith(("site-packages", "purelib")))
    (installed / "below.pth").write_text("\n".join(below) + "\n")
    return python


def run_in(python: Path, program: str) -> str:
    done = subprocess.run(
        [str(python), "-I", "-c", program], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ENTRY_POINTS = """
import importlib.metadata, importlib.util, json
rows, seen = [], set()
for dist in importlib.metadata.distributions():  # the environment's own come first
    name = dist.metadata["Name"]
    if name not in NAMES or name in seen:
        continue
    seen.add(name)
    for ep in dist.entry_points:
        try:
            spec = importlib.util.find_spec(ep.module)
        except ModuleNotFoundError:
            spec = None
        rows.append([name, f"{ep.group}: {ep.name} = {ep.value}", spec.origin if spec else None, ep.attr])
print(json.dumps(rows))
"""


def bound_names(source: str) -> set[str]:
    """What a module binds at its top level."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        else:
            names.update(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return names


def test_entry_points_lead_to_files_of_the_wheels(python: Path) -> None:
    names = [project_table(p)["name"] for p in PROJECTS]
    rows = json.loads(run_in(python, ENTRY_POINTS.replace("NAMES", repr(names))))
    assert {name for name, *_ in rows} == set(names)
    environment = str(python.parent.parent)
    astray = [entry for _, entry, origin, _ in rows if not (origin or "").startswith(environment)]
    assert astray == []
    unbound = [e for _, e, origin, attr in rows if attr and attr not in bound_names(Path(origin).read_text())]
    assert unbound == []


def test_every_requirement_is_met(python: Path, built: dict[Path, Built]) -> None:
    wanted = [str(r) for b in built.values() for r in b.requirements if not (r.marker and "extra" in str(r.marker))]
    program = f"""
import importlib.metadata as metadata
from packaging.requirements import Requirement
for text in {wanted!r}:
    requirement = Requirement(text)
    if requirement.marker is None or requirement.marker.evaluate():
        version = metadata.version(requirement.name)
        assert requirement.specifier.contains(version, prereleases=True), (text, version)
"""
    run_in(python, program)


def test_the_installed_core_runs(python: Path) -> None:
    where = run_in(python, "import nemo_rl_core; print(nemo_rl_core.__file__, nemo_rl_core.__version__)")
    assert where.startswith(str(python.parent.parent))


# -- a stranger's package --------------------------------------------------------------------------------


def readme_files() -> dict[str, str]:
    """The files of the README's plugin: each block that follows a line with nothing but a file name."""
    text = (ROOT / "README.md").read_text()
    return dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def test_the_plugin_of_the_readme_is_found_by_name(tmp_path: Path, python: Path) -> None:
    files = readme_files()
    assert sorted(files) == ["my_rewards.py", "pyproject.toml"]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    target = tmp_path / "installed"
    done = subprocess.run(
        [*command, "--target", str(target), str(tmp_path)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    program = f"""
import sys
sys.path.insert(0, {str(target)!r})
from nemo_rl_core.registry import get_registry
reference = get_registry().resolve("rewards", "short")
assert reference.distribution == "my-rewards", reference
print(reference.load()("a short one"))
"""
    assert run_in(python, program).strip() == "1.0"
