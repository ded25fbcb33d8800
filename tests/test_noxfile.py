"""Sessions install what their tests may use, from where pip would."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def noxfile() -> ModuleType:
    pytest.importorskip("nox")
    found = importlib.util.spec_from_file_location("project_noxfile", ROOT / "noxfile.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def folder(noxfile: ModuleType, name: str) -> str:
    """Of a package, by the last part of it, wherever its family stands."""
    (found,) = (package for package in noxfile.PACKAGES if Path(package).name == name)
    return found


def names(packages: list[str]) -> set[str]:
    return {Path(package).name or "." for package in packages}


def test_every_package_is_found_once(noxfile: ModuleType) -> None:
    files = [path.parent for path in ROOT.glob("plugins/**/pyproject.toml")] + list(ROOT.glob("nemo_rl_plugins_*"))
    assert sorted(noxfile.PACKAGES[1:]) == sorted(str(path.relative_to(ROOT)) for path in files)


def test_tests_of_a_package_have_that_package_and_what_it_declares(noxfile: ModuleType) -> None:
    datasets, sft = folder(noxfile, "datasets"), folder(noxfile, "sft")
    assert names(noxfile.packages_for([datasets])) == {".", "datasets"}
    assert names(noxfile.packages_for([f"{datasets}/tests", "-x"])) == {".", "datasets"}
    assert names(noxfile.packages_for([sft])) == {".", "sft", "dtensor"}  # of its dependency group
    assert names(noxfile.packages_for([sft, datasets])) == {".", "sft", "dtensor", "datasets"}


def test_what_a_package_declares_declares_more(noxfile: ModuleType) -> None:
    found = names(noxfile.packages_for([folder(noxfile, "nemo_rl")]))
    assert {"grpo", "dtensor", "torch_engine", "math"} <= found and "ray" not in found


@pytest.mark.parametrize("arguments", [[], ["-x"], ["tests/registry"], ["-k", "grpo"], ["tests/registry::test"]])
def test_other_tests_have_every_package(noxfile: ModuleType, arguments: list[str]) -> None:
    assert noxfile.packages_for(arguments) == noxfile.PACKAGES


def test_uv_installs_from_where_pip_would(noxfile: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = tmp_path / "pip.conf"
    settings.write_text(
        "[global]\nindex-url = https://a.example/simple\nextra-index-url =\n  https://b.example\n  https://c.example\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels /more")
    found = noxfile.pip_settings_for_uv()
    assert found["UV_INDEX_URL"] == "https://a.example/simple"
    assert found["UV_EXTRA_INDEX_URL"] == "https://b.example https://c.example"
    assert found["UV_FIND_LINKS"] == "/wheels,/more"
    assert found["UV_COMPILE_BYTECODE"] == "1", "each process would compile what it imports"
    monkeypatch.setenv("PIP_INDEX_URL", "https://d.example/simple")
    assert noxfile.pip_settings_for_uv()["UV_INDEX_URL"] == "https://d.example/simple"


SESSIONS = """
def alone(session):
    with one_at_a_time(session):
        Path("running").touch(exist_ok=False)  # fails if the other is here too
        session.run("python", "-c", "import time; time.sleep(1)", external=True)
        Path("running").unlink()


@nox.session(python=False)
def tests(session):
    alone(session)
    print("first speaks")


@nox.session(python=False)
def tests_vllm(session):
    alone(session)
    print("second speaks")
    session.error("broken")
"""


def test_sessions_side_by_side_fail_if_one_does(tmp_path: Path) -> None:
    """The real session, over two small ones: they take turns, and the failure of the second counts."""
    shared, found, _ = (ROOT / "noxfile.py").read_text(encoding="utf-8").partition("@nox.session\ndef tests(")
    assert found
    shared = shared.replace("Path(__file__).parent", f"Path({str(ROOT)!r})").replace("cwd=ROOT", "cwd=Path.cwd()")
    (tmp_path / "noxfile.py").write_text(shared + SESSIONS, encoding="utf-8")
    command = [sys.executable, "-m", "nox", "--envdir", str(tmp_path / "env")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "\nfirst speaks\n" in done.stdout and "[tests_vllm] second speaks\n" in done.stdout
    assert "Failed: tests_vllm (took" in done.stderr
