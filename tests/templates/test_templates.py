"""What `nemo-rl plugins new` writes: names, budgets of lines, updates, and what it refuses."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
import yaml

from nemo_rl_core.cli.plugin_commands.templates import ANSWERS_FILE, kind_named, new_plugin, update_plugin
from nemo_rl_core.errors import ConfigError, NemoRLError
from nemo_rl_core.registry import KINDS
from nemo_rl_core.testing.conformance.frame.kit import contract_for, contracts

BUDGETS = {"rewards": 5, "environments": 20, "losses": 25, "algorithms": 100}
"""Lines of the author's own code at most."""


def own_lines(source: str) -> int:
    """Lines with code of the author: without imports, docstrings, comments, blank lines and `__all__`."""
    tree = ast.parse(source)
    free: set[int] = set()
    for node in ast.walk(tree):
        imports = isinstance(node, ast.Import | ast.ImportFrom)
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        exported = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        guard = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if imports or text or exported or guard:
            free |= set(range(node.lineno, node.end_lineno + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - free)


def test_lines_are_counted_as_they_should_be() -> None:
    source = """'''M.'''

import os  # x

__all__ = ["f"]

def f(x,
      y):
    '''D.'''
    # c
    return (x,
            y)
"""
    assert own_lines(source) == 4


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> dict[str, Path]:
    """A package of each kind."""
    folder = tmp_path_factory.mktemp("packages")
    return {kind: new_plugin(kind, f"my_{kind}", folder) for kind in KINDS}


def component(package: Path) -> Path:
    """The module that the entry point names."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    ((_, table),) = ((g, t) for g, t in project["entry-points"].items() if g != "nemo_rl.api")
    (value,) = table.values()
    return package / "src" / (value.partition(":")[0].replace(".", "/") + ".py")


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_gives_a_whole_package(packages: dict[str, Path], kind: str) -> None:
    package = packages[kind]
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["nemo_rl.api"] == {kind: f"v{KINDS[kind].api_version}"}
    assert list(project["entry-points"][f"nemo_rl.{kind}"]) == [f"my_{kind}"]
    assert project["dependencies"][0] == "nemo-rl-core>=0.1,<0.2"
    steps = yaml.safe_load((package / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    assert {"run": "pytest"} in steps
    assert (package / ".gitignore").is_file() and (package / "README.md").read_text().count("```") % 2 == 0
    text = component(package).read_text()
    compile(text, "component", "exec")
    assert "{{" not in text and "{%" not in text
    (test,) = (package / "tests").glob("test_*.py")
    compile(test.read_text(), "test", "exec")


@pytest.mark.parametrize("kind", BUDGETS)
def test_the_author_writes_few_lines(packages: dict[str, Path], kind: str) -> None:
    assert own_lines(component(packages[kind]).read_text()) <= BUDGETS[kind]


@pytest.mark.parametrize("kind", contracts())
def test_the_test_defines_the_fixture_of_its_kit(packages: dict[str, Path], kind: str) -> None:
    (test,) = (packages[kind] / "tests").glob("test_*.py")
    (suite,) = (node for node in ast.parse(test.read_text()).body if isinstance(node, ast.ClassDef))
    contract = contract_for(kind)
    assert [ast.unparse(base) for base in suite.bases] == [contract.__name__]
    assert contract.subject in [node.name for node in suite.body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize(
    ("text", "kind"),
    [("loss", "losses"), ("losses", "losses"), ("training-backend", "training_backends"), ("Sandbox", "sandboxes")],
)
def test_kinds_may_be_singular(text: str, kind: str) -> None:
    assert kind_named(text) == kind


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'loss'"):
        new_plugin("los", "x", tmp_path)
    for name in ("My Loss", "9x", "a:b", "class", ""):
        with pytest.raises(ConfigError, match="cannot be the name|word of Python"):
            new_plugin("loss", name, tmp_path)
    new_plugin("reward", "twice", tmp_path)
    with pytest.raises(ConfigError, match="not empty"):
        new_plugin("reward", "twice", tmp_path)


def test_names_can_be_chosen(tmp_path: Path) -> None:
    package = new_plugin("reward", "short", tmp_path, distribution="acme.rewards", package="acme")
    assert package == tmp_path / "acme.rewards"
    assert component(package) == package / "src/acme/reward.py"


def test_update_brings_the_frame_up_to_date_and_keeps_the_authors_files(tmp_path: Path) -> None:
    package = new_plugin("reward", "kept", tmp_path)
    assert update_plugin(package) == []
    pyproject, mine = package / "pyproject.toml", component(package)
    pyproject.write_text(pyproject.read_text().replace("nemo-rl-core>=0.1,<0.2", "nemo-rl-core>=0.0,<0.1"))
    mine.write_text("def kept(response):\n    return 1.0\n")
    (package / "README.md").write_text("Mine.\n")
    assert update_plugin(package) == ["pyproject.toml"]
    assert "nemo-rl-core>=0.1,<0.2" in pyproject.read_text()
    assert mine.read_text() == "def kept(response):\n    return 1.0\n"
    assert (package / "README.md").read_text() == "Mine.\n"
    (package / ANSWERS_FILE).unlink()
    with pytest.raises(ConfigError, match="was not made by"):
        update_plugin(package)


def test_without_copier_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "copier", None)
    with pytest.raises(NemoRLError, match=r"pip install 'nemo-rl-core\[templates\]'"):
        new_plugin("reward", "x", tmp_path)


def test_the_command_shows_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nemo_rl_core.cli import main

    assert main(["plugins", "new", "reward", "shown", "--path", str(tmp_path)]) == 0
    assert "nemo-rl-env-shown/pyproject.toml" in capsys.readouterr().out
    assert main(["plugins", "new", "--update", str(tmp_path / "nemo-rl-env-shown")]) == 0
    assert "Nothing to change" in capsys.readouterr().out
    assert main(["plugins", "new", "reward"]) == 2
