"""The example plugins, installed from wheels into a fresh environment as a stranger would, tested there and run."""

from __future__ import annotations

import json
import os
import site
import sqlite3
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("examples")  # one worker makes what they share

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.parent for path in ROOT.glob("examples/plugins/*/pyproject.toml"))
OURS = [
    ROOT,
    *sorted(
        path.parent
        for pattern in ("plugins/*", "plugins/*/*", "nemo_rl_plugins_*")
        for path in ROOT.glob(f"{pattern}/pyproject.toml")
    ),
]

CONFIG = """
algorithm: grpo
model: scratch:qwen2-tiny
num_prompts_per_step: 4
num_generations_per_prompt: 4
max_steps: 2
run_dir: run
policy: {backend: simple, max_sequence_length: 160, options: {fused: true}}
generation: {max_new_tokens: 4}
environment: {name: guess_number, options: {highest: 5, max_guesses: 3}}
rollouts: {max_turns: 3}
data: {train: {source: rows.jsonl}}
logging: {progress: none, loggers: [{name: sqlite}]}
"""


def checked(*command: object, cwd: Path, timeout_s: float = 100) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout_s,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of an environment of its own; third-party libraries are those of this one."""
    base = tmp_path_factory.mktemp("stranger")
    wheels = base / "wheels"
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", wheels]
    checked(*build, *OURS, *EXAMPLES, cwd=base)
    venv.create(base / "env", with_pip=False)
    python = base / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    names = [wheel.name.partition("-")[0] for wheel in wheels.glob("*.whl")]
    install = [
        "install",
        "--quiet",
        "--no-compile",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--find-links",
        wheels,
    ]
    checked(*pip, "--python", python, *install, *names, cwd=base)
    folder = base / "env"
    installed = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    below = dict.fromkeys(p for p in [*site.getsitepackages(), *sys.path] if p.endswith(("site-packages", "purelib")))
    (installed / "below.pth").write_text("\n".join(below) + "\n")  # editable installs of those are not seen
    return python


def test_there_is_one_of_each() -> None:
    groups = {path.name: (path / "pyproject.toml").read_text() for path in EXAMPLES}
    kinds = [kind for kind in ("environments", "training_backends", "loggers", "commands") for text in groups.values()
             if f'entry-points."nemo_rl.{kind}"' in text]  # fmt: skip
    assert kinds == ["environments", "training_backends", "loggers", "commands"]
    assert all((path / "README.md").is_file() and any(path.glob("tests/test_*.py")) for path in EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_its_own_tests_pass_where_it_is_installed(python: Path, tmp_path: Path, example: Path) -> None:
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", example / "pyproject.toml", example / "tests"]
    if example.name == "simple_backend":  # all of its clauses take a minute; these are the quick ones
        tests += ["-k", "logprobs or step or packing or declares or says"]
    out = checked(python, "-P", *tests, cwd=tmp_path)
    assert " passed" in out and "failed" not in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("guess_number", []), ("simple", ["--only", "data_parallel", "--only", "logprobs"])]
)
def test_the_kit_finds_by_their_names_what_it_needs(python: Path, tmp_path: Path, name: str, options: list[str]):
    out = checked(python, "-P", "-m", "nemo_rl_core.cli", "plugins", "check", name, *options, cwd=tmp_path)
    assert " 0 failed" in out


@pytest.mark.slow
def test_a_run_uses_them_all(python: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": "", "number": n % 6}) + "\n" for n in range(8)))
    (tmp_path / "config.yaml").write_text(CONFIG)
    command = [python, "-P", "-m", "nemo_rl_core.cli"]
    listed = checked(*command, "plugins", "list", cwd=tmp_path)
    for name in ("guess_number", "simple", "sqlite", "rollout-report"):
        assert f" {name} " in listed
    checked(*command, "train", "config.yaml", cwd=tmp_path)
    manifest = {row["name"]: row for row in json.loads((tmp_path / "run" / "manifest.json").read_text())}
    assert manifest["guess_number"]["distribution"] == "nemo-rl-env-guess-number"
    assert manifest["simple"]["version"] == "1.0.0"
    with sqlite3.connect(tmp_path / "run" / "metrics.sqlite") as database:
        steps = database.execute("SELECT step FROM metrics WHERE name = 'train/loss' ORDER BY step").fetchall()
        assert (steps, database.execute("SELECT status FROM runs").fetchall()) == ([(1,), (2,)], [("completed",)])
    report = checked(*command, "rollout-report", "run", "--top", "2", cwd=tmp_path)
    assert report.startswith("16 rollouts of 4 prompts, 0 failed") and report.count("Guess my number") == 4


@pytest.mark.slow
def test_the_algorithm_in_one_file_learns(python: Path, tmp_path: Path) -> None:
    script = ROOT / "examples" / "algorithms" / "reinforce.py"
    assert len(script.read_text().splitlines()) <= 100
    out = checked(python, "-P", script, "max_steps=20", "run_dir=run", "logging.progress=none", cwd=tmp_path)
    first, last = (float(word) for word in out.split() if word.replace(".", "").isdigit())
    assert last > first + 0.5
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())[0]["value"] == "__main__:Reinforce"


@pytest.mark.slow
def test_ppo_learns_and_so_does_its_critic(python: Path, tmp_path: Path) -> None:
    script = ROOT / "examples" / "algorithms" / "ppo.py"
    out = checked(python, "-P", script, "max_steps=30", "run_dir=run", "logging.progress=none", cwd=tmp_path)
    for name, at_first, at_last in (("reward/mean", 0.1, 0.3), ("train/critic/explained_variance", 0.1, 0.3)):
        (line,) = (line for line in out.splitlines() if line.startswith(name))
        first, last = (float(word) for word in line.removeprefix(f"{name}:").split() if word[-1].isdigit())
        assert first < at_first and last > at_last, line
