"""A package of every kind, as a stranger would have it: built, installed beside the wheels of ours, tested and used.

One fresh environment serves all kinds. It sees the third-party packages of this one, but none of our working trees.
"""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nemo_rl_core.registry import KINDS
from nemo_rl_core.testing.conformance.frame.kit import contracts

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("templates"), pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
OURS = [
    ROOT,
    *(ROOT / "plugins" / name for name in ("backends/dtensor", "backends/torch_engine", "algorithms/grpo", "nemo_rl")),
]
"""The facade says which backend is the default, where several are installed."""
TESTED = [*contracts(), "commands"]
"""Kinds whose kit is there; the generated tests of the others could not be collected."""
NOT_THERE = [
    tomllib.loads((path / "pyproject.toml").read_text())["project"]["name"]
    for pattern in ("plugins/*", "plugins/*/*", "nemo_rl_plugins_*")
    for path in (p.parent for p in ROOT.glob(f"{pattern}/pyproject.toml"))
    if path not in OURS
]
"""Ours whose metadata the fresh environment may see in this one's folder, without their code."""


class Fresh:
    """The environment, the folder of generated packages, and what their tests came to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "env", with_pip=False)
        self.python = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
        base = {"base": str(folder / "env"), "platbase": str(folder / "env")}
        here = Path(sysconfig.get_path("purelib", vars=base))
        below = dict.fromkeys(p for p in [*site.getsitepackages(), *sys.path] if p.endswith("site-packages"))
        (here / "below.pth").write_text("\n".join(below) + "\n")  # comes after its own; .pth files there are not read

    def install(self, *projects: Path) -> None:
        """Build wheels and install them, without the network."""
        wheels = self.folder / f"wheels-{projects[0].name}"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
        run([*pip, "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", wheels, *projects])
        found = sorted(wheels.glob("*.whl"))
        assert len(found) == len(projects)
        run([*pip, "--python", self.python, "install", "-q", "--no-compile", "--no-deps", "--no-index", *found])

    def run(self, *arguments: object, cwd: Path | None = None) -> str:
        """Standard output of a command of the fresh interpreter; it must succeed."""
        return run([self.python, *arguments], cwd=cwd or self.folder)


def run(command: list[object], cwd: Path | None = None) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "NEMO_RL", "PYTEST", "COV"))}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["NEMO_RL_DISABLE_PLUGINS"] = ",".join(NOT_THERE)
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """With the core, an engine, a trainer and an algorithm of ours, and a generated package of each kind."""
    made = Fresh(tmp_path_factory.mktemp("fresh"))
    made.install(*OURS)
    packages = made.folder / "packages"
    made.run("-c", NEW, packages)
    made.install(*sorted(packages.iterdir()))
    return made


NEW = """
import sys
from pathlib import Path
import nemo_rl_core.cli.plugin_commands.templates as templates
from nemo_rl_core.registry import KINDS
assert "site-packages" in templates.__file__, templates.__file__  # the wheel's, not a working tree's
for kind in KINDS:
    templates.new_plugin(kind, f"my_{kind}", Path(sys.argv[1]))
"""


def package(fresh: Fresh, kind: str) -> Path:
    (found,) = (path for path in (fresh.folder / "packages").iterdir() if path.name.endswith(kind.replace("_", "-")))
    return found


@pytest.fixture(scope="session")
def outcomes(fresh: Fresh) -> dict[str, list[str]]:
    """Kind to how each of its tests went; the tests of all kinds run in one process."""
    report = fresh.folder / "report.xml"
    suites = [package(fresh, kind) / "tests" for kind in TESTED]
    options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", fresh.folder, "--import-mode=importlib"]
    command = [str(fresh.python), "-m", "pytest", *options, f"--junit-xml={report}", *suites]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name in ("PYTHONPATH", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER"):
        env.pop(name, None)
    subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kind = next(k for k in KINDS if f"my_{k}" in (case.get("classname") or "") + (case.get("name") or ""))
        problems = [child for child in case if child.tag in ("failure", "error")]
        text = "".join(f"\n{case.get('name')}: {child.get('message')}\n{child.text}" for child in problems)
        found.setdefault(kind, []).append(text)
    return found


@pytest.mark.parametrize("kind", TESTED)
def test_its_tests_pass(outcomes: dict[str, list[str]], kind: str) -> None:
    assert kind in outcomes
    assert "".join(outcomes[kind])[:6000] == ""


CHECKED = """
import sys
from nemo_rl_core.registry import get_registry
from nemo_rl_core.testing.conformance.frame.kit import check_component, clauses, contract_for

for kind in sys.argv[1:]:
    ref = get_registry().resolve(kind, f"my_{kind}")
    clause = "data_parallel" if kind == "training_backends" else next(iter(clauses(contract_for(kind))))
    for result in check_component(ref, only=[clause]).results:
        print(kind, result.outcome)
"""


def test_the_kits_take_them_by_name(fresh: Fresh) -> None:
    """As their READMEs say: each gives its kit what it is to be checked with."""
    lines = fresh.run("-c", CHECKED, *(kind for kind in TESTED if kind != "commands")).splitlines()
    found = dict(line.split() for line in lines if line.split()[0] in TESTED and len(line.split()) == 2)
    assert found.pop("training_backends") == "skipped"  # it has one process
    assert found == dict.fromkeys(set(TESTED) - {"commands", "training_backends"}, "passed")


def test_doctor_finds_nothing_wrong(fresh: Fresh) -> None:
    found = json.loads(fresh.run("-m", "nemo_rl_core.cli", "plugins", "doctor", "--json"))
    assert found["healthy"], found


RUNS = """
import json, sys
import torch
from nemo_rl_core.training.trainer import Trainer

torch.set_num_threads(1)
tiny = {
    "model": "scratch:qwen2-tiny", "learning_rate": 1e-3, "max_steps": 2, "num_prompts_per_step": 4,
    "num_generations_per_prompt": 2, "policy": {"max_sequence_length": 64}, "generation": {"max_new_tokens": 4},
    "data": {"train": {"source": "my_datasets", "options": {"num_rows": 16}}}, "logging": {"progress": "json"},
}
first = {
    **tiny, "algorithm": "my_algorithms", "run_dir": "first", "reward": "my_rewards", "weight_sync": "my_weight_syncs",
    "policy": {**tiny["policy"], "backend": "my_training_backends"},
    "generation": {**tiny["generation"], "backend": "my_generation_backends"},
    "cluster": {"launcher": "my_launchers", "device": "cpu"},
    "logging": {"progress": "json", "loggers": ["my_loggers"]},
}
second = {
    **tiny, "algorithm": "grpo", "run_dir": "second", "loss": "my_losses", "advantage": "my_advantages",
    "policy": {**tiny["policy"], "backend": "dtensor"}, "generation": {**tiny["generation"], "backend": "torch_engine"},
    "environment": "my_environments", "rollouts": {"max_turns": 2}, "cluster": {"device": "cpu"},
}
for config, callbacks in ((first, ["my_callbacks"]), (second, [])):
    result = Trainer(config).fit(callbacks=callbacks)
    assert result.status == "completed" and result.step == 2, result
"""

USED = {
    "first": "algorithms callbacks datasets generation_backends launchers loggers rewards training_backends "
    "weight_syncs",
    "second": "advantages datasets environments losses",
}


@pytest.fixture(scope="session")
def runs(fresh: Fresh) -> list[dict]:
    """The events of two runs that use every generated component of a run."""
    return [json.loads(line) for line in fresh.run("-c", RUNS).splitlines() if line.startswith("{")]


@pytest.mark.parametrize("run_dir", USED)
def test_it_is_used_in_a_run(fresh: Fresh, runs: list[dict], run_dir: str) -> None:
    rows = json.loads((fresh.folder / run_dir / "manifest.json").read_text())
    mine = {row["kind"]: row for row in rows if row["name"].startswith("my_")}
    assert sorted(mine) == USED[run_dir].split()
    assert {(row["version"], row["source_hash"]) for row in mine.values()} == {("0.1.0", None)}
    (start,) = (event for event in runs if event["event"] == "start" and Path(event["run_dir"]).name == run_dir)
    third_party = {row["kind"] for row in start["plugins"] if row["third_party"]}
    assert third_party == set(mine)


def test_the_logger_wrote(fresh: Fresh, runs: list[dict]) -> None:
    lines = [json.loads(line) for line in (fresh.folder / "first" / "my_loggers.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, 1, 2, None]


def test_the_command_runs(fresh: Fresh, runs: list[dict]) -> None:
    shown = fresh.run("-m", "nemo_rl_core.cli", "my_commands", "first", "--last", "1")
    assert shown.startswith("2\t")


USE_ALONE = """
import asyncio
from pathlib import Path
from nemo_rl_core.registry import get_registry
from nemo_rl_core.protocols.sandbox import SandboxProgram

sandbox = get_registry().resolve("sandboxes", "my_sandboxes").load()()
print(asyncio.run(sandbox.run(SandboxProgram(source="print(6 * 7)"))).stdout.strip())
exporter = get_registry().resolve("exporters", "my_exporters").load()()
print("model.safetensors" in exporter.export(Path("first/model"), "exported").files)
"""


@pytest.mark.skipif("sandboxes" not in TESTED or "exporters" not in TESTED, reason="their contracts are not there")
def test_sandbox_and_exporter_do_their_work(fresh: Fresh, runs: list[dict]) -> None:
    assert fresh.run("-c", USE_ALONE).split() == ["42", "True"]
