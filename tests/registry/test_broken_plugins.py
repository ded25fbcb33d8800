"""Sixty ways for a plugin to be broken: who does not use it notices nothing, who does gets one precise message.

Real command lines on real installed distributions; one process serves each table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

from nemo_rl_core.testing.site import PluginSite

pytestmark = [pytest.mark.xdist_group("broken"), pytest.mark.timeout(700)]  # one worker makes what they share

ENVIRONMENT = """
    from nemo_rl_core.protocols.environment import SingleTurnEnvironment
    class Env(SingleTurnEnvironment):
        async def score(self, task, response):
            return float(len(response) % 2)
"""

CONFIG = {
    "algorithm": "grpo",
    "model": "scratch:qwen2-tiny",
    "num_prompts_per_step": 2,
    "num_generations_per_prompt": 2,
    "max_steps": 1,
    "policy": {"max_sequence_length": 24},
    "generation": {"max_new_tokens": 2},
    "logging": {"progress": "none"},
    "checkpointing": {"enabled": False},
    "data": {"train": {"source": "rows.jsonl"}},
    "environment": "good_env",
}


class Way(NamedTuple):
    """One way to be broken."""

    name: str
    module: str | None
    """Source of the module `<name>_mod`."""
    message: tuple[str, ...]
    """What the one message must hold, beside distribution and version: what is wrong and the fix."""
    kind: str = "environments"
    value: str = "{module}:Env"
    requires: tuple[str, ...] = ()
    component: str = ""
    """Name of the component; by default `<name>_env`."""
    use: tuple[str, ...] = ()
    """Overrides that use it; by default `environment=<component>`."""
    status: int = 3
    warns: bool = False
    """The message is a warning, and the run goes on."""

    @property
    def dist(self) -> str:
        return f"{self.name.replace('_', '-')}-dist"

    @property
    def overrides(self) -> tuple[str, ...]:
        return self.use or (f"environment={self.component or f'{self.name}_env'}",)


REPAIR = "NEMO_RL_DISABLE_PLUGINS={dist}"
WAYS = [
    Way("import_error", "import no_such_library", ("ModuleNotFoundError: No module named 'no_such_library'", REPAIR)),
    Way("attribute", ENVIRONMENT, ("has no attribute 'Gone'; it has Env", REPAIR), value="{module}:Gone"),
    Way(
        "protocol",
        "class Env:\n    config_class = dict\n    def __init__(self, config, context): ...\n"
        "    def reset(self, task, seed): ...",
        ("Env is not an environment: it lacks step, close", "nemo_rl_core.protocols.environment:Environment", REPAIR),
    ),
    Way(
        "signature",
        "class Env:\n    config_class = dict\n    def __init__(self, config, context): ...\n"
        "    def reset(self, task): ...\n    def step(self, message): ...\n    def close(self): ...",
        ("reset(self, task)", "cannot be called as the core does, reset(task, seed): too many positional", REPAIR),
    ),
    Way(
        "newer_core",
        ENVIRONMENT,
        ("it requires nemo-rl-core>=99", "pip install -U nemo-rl-core"),
        requires=("nemo-rl-core>=99",),
    ),
    Way(
        "duplicate",
        ENVIRONMENT,
        ("is provided by 2", "good-dist 1.0", "plugins: {good_env:"),
        component="good_env",
    ),
    Way(
        "shadow",
        ENVIRONMENT,
        ("'math' is provided by 2", "nemo-rl-env-math", "plugins: {math:"),
        component="math",
    ),
    Way(
        "hook",
        "critical = True\ndef on_step_end(run, metrics):\n    raise ValueError('the disk is gone')",
        ("plugin hook_env 1.2 (dist hook-dist), hook on_step_end: ValueError: the disk is gone", REPAIR),
        kind="hooks",
        value="{module}",
        use=("environment=good_env",),
        status=70,
    ),
    Way(
        "slow",
        "import time\ntime.sleep(0.6)\n" + textwrap.dedent(ENVIRONMENT),
        ("still being imported after 0.3 s", "NEMO_RL_SLOW_IMPORT_S"),
        status=0,
        warns=True,
    ),
    Way(
        "config_class",
        textwrap.dedent(ENVIRONMENT) + "class Options: ...\nEnv.config_class = Options",
        ("config_class config_class_mod.Options, which is not an attrs class", "@attrs.frozen", REPAIR),
    ),
    Way(
        "malformed",
        ENVIRONMENT,
        ("malformed entry point 'malformed_env = malformed_mod.Env'", "module:attr"),
        value="{module}.Env",
    ),
    Way(
        "prints",
        "print('hello from a plugin')\n" + textwrap.dedent(ENVIRONMENT),
        ("printed to standard output while it was imported ('hello from a plugin'", "logging"),
        status=0,
        warns=True,
    ),
]

# -- ways to fail while it is used: at import, in its constructor, in each method, by each way to exit -----------------

HEAD = """
import asyncio, os, sys
class Odd(BaseException): ...
class Untold(Exception):
    def __str__(self):
        raise TypeError
def fail(error):
    raise error
"""
BASES = {
    "environments": "from nemo_rl_core.protocols.environment import EnvironmentStep, SingleTurnEnvironment as Base",
    "algorithms": "from nemo_rl_plugins_grpo.algorithm import GRPO as Base",
    "losses": "from nemo_rl_plugins_grpo.losses.clipped import ClippedPolicyGradientLoss as Base",
    "rewards": "Base = object",
    "hooks": "Base = object",
    "loggers": "Base = object",
    "datasets": "Base = object",
}
OVERRIDES = {
    "environments": ("environment={name}",),
    "algorithms": ("algorithm={name}",),
    "losses": ("loss={name}",),
    "rewards": ("environment=null", "reward={name}"),
    "hooks": (),
    "loggers": ("logging.loggers=[{name}]",),
    "datasets": ("data.train.source={name}",),
}
LOGGER = "config_class = dict; __init__ = start = finish = lambda self, *a, **k: None; "


class Use(NamedTuple):
    """One way."""

    name: str
    kind: str
    body: str
    """Of the class `C(Base)`, in one line; or, if it begins with "module: ", of the module."""
    message: str
    status: int = 70
    """0: the run goes on with one warning."""
    warnings: int = 0
    """Before the error."""

    @property
    def dist(self) -> str:
        return f"{self.name.replace('_', '-')}-dist"

    @property
    def overrides(self) -> tuple[str, ...]:
        return tuple(each.format(name=f"{self.name}_x") for each in OVERRIDES[self.kind])

    @property
    def source(self) -> str:
        own = self.body.removeprefix("module: ")
        if own == self.body:
            own = f"class C(Base):\n    {self.body}\n"
        if self.kind == "environments" and "def score" not in own:
            own += "\nif 'C' in globals():\n    async def score(self, task, response):\n"
            own += "        return float(len(response) % 2)\n    C.score = score\n"
        return f"{textwrap.dedent(HEAD)}{BASES[self.kind]}\n{own}\n"

    def install(self, folder: Path) -> None:
        folder.mkdir()
        module = f"{self.name}_mod"
        value = module if self.kind == "hooks" else f"{module}:C"
        site = PluginSite(folder)
        site.install(self.dist, "1.2", entry_points={self.kind: {f"{self.name}_x": value}})
        (folder / f"{module}.py").write_text(self.source)
        if self.name == "latin":
            path = folder / "latin_dist-1.2.dist-info" / "METADATA"
            path.write_bytes(path.read_bytes() + "Author: René\n".encode("latin-1"))


EXIT, STOP = "called sys.exit(0), which would have ended", "raised StopIteration, which would have been taken"
INTERRUPT, ODD = "raised KeyboardInterrupt, which only the interpreter may do", "raised Odd: x. It is no Exception"
UNTOLD = "raised Untold (its text cannot be shown: __str__ raised TypeError)"

IMPORT = [
    Use("import_exit", "environments", "module: sys.exit(0)", "importing it raised SystemExit: 0", 3),
    Use("import_interrupt", "environments", "module: raise KeyboardInterrupt", "raised KeyboardInterrupt", 3),
    Use("import_odd", "environments", "module: raise Odd('x')", "importing it raised Odd: x", 3),
    Use("import_untold", "environments", "module: raise Untold", "raised Untold: (its text cannot be shown", 3),
    Use("import_stop", "environments", "module: raise StopIteration", "importing it raised StopIteration", 3),
    Use("latin", "environments", "pass", "its METADATA in ", 3),
]
ENVIRONMENTS = [
    Use("init_exit", "environments", "def __init__(self, c, x): sys.exit(0)", EXIT, 1),
    Use("init_error", "environments", "def __init__(self, c, x): raise ValueError('bad')", "ValueError: bad", 1),
    Use("reset_stop", "environments", "def reset(self, task, seed): next(iter(()))", STOP, 1),
    Use("reset_none", "environments", "def reset(self, task, seed): pass", "C.reset returned NoneType", 1),
    Use("reset_property", "environments", "reset = property(lambda self: sys.exit(0))", EXIT, 1),
    Use("step_exit", "environments", "async def step(self, message): sys.exit(0)", EXIT, 1),
    Use("step_interrupt", "environments", "async def step(self, message): raise KeyboardInterrupt", INTERRUPT, 1),
    Use("step_odd", "environments", "def step(self, message): raise Odd('x')", ODD, 1),
    Use("step_untold", "environments", "def step(self, message): raise Untold", UNTOLD, 1),
    Use("step_none", "environments", "def step(self, message): pass", "C.step returned NoneType", 1),
    Use(
        "step_cancelled",
        "environments",
        "async def step(self, m): raise asyncio.CancelledError",
        "A task inside the episode was cancelled",
        1,
    ),
    Use(
        "rewards_list",
        "environments",
        "def step(self, m): return EnvironmentStep(rewards=[1], terminated=True)",
        "they must be a mapping",
        1,
    ),
    Use("reward_nan", "environments", "async def score(self, task, response): return float('nan')", "is nan", 1),
    Use("close_exit", "environments", "def close(self): sys.exit(0)", EXIT, 1),
    Use("close_odd", "environments", "async def close(self): raise Odd('x')", ODD, 1),
]
ALGORITHMS = [
    Use("a_init_exit", "algorithms", "def __init__(self, config, context): sys.exit(0)", EXIT),
    Use("a_models_exit", "algorithms", "models = property(lambda self: sys.exit(0))", EXIT),
    Use("a_keep_stop", "algorithms", "def keep_group(self, group): raise StopIteration", STOP),
    Use("a_build_stop", "algorithms", "def build_batch(self, items): next(iter(()))", STOP),
    Use("a_build_exit", "algorithms", "def build_batch(self, items): sys.exit(0)", EXIT),
    Use("a_build_error", "algorithms", "def build_batch(self, items): raise ValueError('bad')", "ValueError: bad"),
    Use("a_fill_exit", "algorithms", "def fill_batch(self, batch, models): sys.exit(0)", EXIT),
    Use("a_fill_stop", "algorithms", "def fill_batch(self, batch, models): raise StopIteration", STOP),
    Use("a_finish_interrupt", "algorithms", "def finish_batch(self, batch): raise KeyboardInterrupt", INTERRUPT),
    Use("a_finish_untold", "algorithms", "def finish_batch(self, batch): raise Untold", UNTOLD),
    Use("a_updates_odd", "algorithms", "def updates(self, batch): raise Odd('x')", ODD),
    Use("a_updates_generator", "algorithms", "def updates(self, batch): yield sys.exit(0)", EXIT),
]
LOSSES = [
    Use("loss_stop", "losses", "def __call__(self, outputs, batch): raise StopIteration", STOP),
    Use("loss_exit", "losses", "def __call__(self, outputs, batch): sys.exit(0)", EXIT),
    Use("loss_untold", "losses", "def __call__(self, outputs, batch): raise Untold", UNTOLD),
    Use("loss_closed", "losses", "def __call__(self, outputs, batch): raise GeneratorExit", "raised GeneratorExit"),
    Use("loss_init_exit", "losses", "def __init__(self, *a): sys.exit(0)", EXIT),
]
REWARDS = [
    Use("r_exit", "rewards", "module: def C(response): sys.exit(0)", "raised SystemExit: 0", 1),
    Use("r_interrupt", "rewards", "module: def C(response): raise KeyboardInterrupt", "raised KeyboardInterrupt", 1),
    Use("r_gone", "rewards", "module: def C(response): os._exit(0)", "ran C died (exit status 0)", 1, 4),
    Use("r_stop", "rewards", "module: def C(response): raise StopIteration", "StopIteration", 1),
    Use("r_untold", "rewards", "module: def C(response): raise Untold", "Untold", 1),
    Use("r_async_exit", "rewards", "module: async def C(response): sys.exit(0)", EXIT, 1),
    Use("r_text", "rewards", "module: def C(response): return 'good'", "it must be a number", 1),
]
DATASETS = [
    Use(
        "d_exit",
        "datasets",
        "config_class = dict; __init__ = lambda self, c: None; load = lambda self: sys.exit(0)",
        EXIT,
    ),
    Use(
        "d_stop",
        "datasets",
        "config_class = dict; __init__ = lambda self, c: None; load = lambda self: next(iter(()))",
        STOP,
    ),
]
LISTENING = [
    Use("h_exit", "hooks", "module: def on_step_end(run): sys.exit(0)", EXIT, 0),
    Use("h_interrupt", "hooks", "module: def on_step_end(run): raise KeyboardInterrupt", INTERRUPT, 0),
    Use("h_odd", "hooks", "module: def on_run_start(run): raise Odd('x')", ODD, 0),
    Use("h_stop", "hooks", "module: def on_batch(run): raise StopIteration", STOP, 0),
    Use("h_untold", "hooks", "module: def on_run_end(run): raise Untold", UNTOLD, 0),
    Use("h_import_exit", "hooks", "module: sys.exit(0)", "raised SystemExit: 0", 0),
    Use("h_import_odd", "hooks", "module: raise Odd('x')", "raised Odd: x", 0),
    Use(
        "h_changes",
        "hooks",
        "module: import torch; os.chdir('/'); torch.manual_seed(0); sys.setrecursionlimit(500)",
        "the recursion limit (put back); the working folder (put back)",
        0,
    ),
]
LOGGERS = [
    Use("l_exit", "loggers", f"{LOGGER}log = lambda self, *a, **k: sys.exit(0)", EXIT, 0),
    Use("l_stop", "loggers", f"{LOGGER}log = lambda self, *a, **k: next(iter(()))", STOP, 0),
]
IN_USE = [*IMPORT, *ENVIRONMENTS, *ALGORITHMS, *LOSSES, *REWARDS, *DATASETS, *LISTENING, *LOGGERS]

# -- the runs -----------------------------------------------------------------------------------------------

DRIVER = """
import contextlib, io, json, logging, os, sys
import torch
torch.set_num_threads(1)
from nemo_rl_core.cli import main
from nemo_rl_core.registry import _registry
from nemo_rl_core.training.reporting.record import read_metrics
from pathlib import Path

site = Path(sys.argv[1])
runs = json.load(open(sys.argv[2]))
results = {}
for run in runs:
    sys.path[:0] = run["paths"]
    os.environ["NEMO_RL_DISABLE_PLUGINS"] = run.get("disabled", "")
    _registry._registry = None
    before = set(sys.modules)
    for handler in logging.root.handlers[:]:
        logging.root.removeHandler(handler)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*run["argv"], "--run-dir", str(site / "runs" / run["name"])])
    os.chdir(site)
    metrics = read_metrics(site / "runs" / run["name"])
    results[run["name"]] = {
        "status": status,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "imported": sorted(m for m in set(sys.modules) - before if m.endswith("_mod")),
        "metrics": {n: metrics[-1][n] for n in ("train/loss", "train/grad_norm", "reward/mean")} if metrics else {},
    }
    del sys.path[:len(run["paths"])]
    for name in set(sys.modules) - before:
        if name.endswith("_mod"):
            del sys.modules[name]
json.dump(results, open(sys.argv[3], "w"))
"""


def install(folder: Path, way: Way) -> None:
    folder.mkdir()
    module = f"{way.name}_mod"
    PluginSite(folder).install(
        way.dist,
        "1.2",
        entry_points={way.kind: {way.component or f"{way.name}_env": way.value.format(module=module)}},
        modules={module: way.module or ""},
        requires=way.requires,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """Of every way a run that uses the plugin and one that does not, and a run without any: one process."""
    base = tmp_path_factory.mktemp("ways")
    good = base / "good"
    good.mkdir()
    site = PluginSite(good)
    site.install(
        "good-dist", entry_points={"environments": {"good_env": "good_mod:Env"}}, modules={"good_mod": ENVIRONMENT}
    )
    (base / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{a}+1="}) + "\n" for a in range(4)))
    (base / "config.json").write_text(json.dumps(CONFIG))
    train = ["train", "config.json"]
    runs = [{"name": "none", "paths": [str(good)], "argv": train}]
    for way in WAYS:
        install(base / way.name, way)
        paths = [str(good), str(base / way.name)]
        not_used = ("environment=good-dist:good_env",) if way.component == "good_env" else ()
        disabled = way.dist if way.kind == "hooks" else ""  # an installed hook plugin listens to every run
        runs.append({"name": f"{way.name}-unused", "paths": paths, "argv": [*train, *not_used], "disabled": disabled})
        runs.append({"name": f"{way.name}-used", "paths": paths, "argv": [*train, *way.overrides]})
    for way in IN_USE:
        way.install(base / way.name)
        runs.append(
            {"name": f"{way.name}-used", "paths": [str(good), str(base / way.name)], "argv": [*train, *way.overrides]}
        )
    everything = [str(good), *(str(base / way.name) for way in IN_USE if way not in LISTENING)]
    runs.append({"name": "among-all", "paths": everything, "argv": train})
    (base / "runs.json").write_text(json.dumps(runs))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(base), "runs.json", "results.json"],
        cwd=base,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "NEMO_RL_SLOW_IMPORT_S": "0.3", "TMPDIR": str(base)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((base / "results.json").read_text())


def test_there_are_more_than_forty() -> None:
    names = [way.name for way in (*WAYS, *IN_USE)]
    assert len(set(names)) == len(names) >= 40


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_who_does_not_use_it_is_unaffected(results, way: Way) -> None:
    found, plain = results[f"{way.name}-unused"], results["none"]
    assert plain["status"] == 0 and plain["metrics"]["train/grad_norm"] >= 0
    out = found["out"].replace(f"{way.name}-unused", "none")
    assert (found["status"], found["metrics"], out) == (0, plain["metrics"], plain["out"])
    assert found["imported"] == ["good_mod"]
    warnings = found["err"].splitlines()
    assert len(warnings) <= 1, warnings  # what is broken by its metadata is named once, and how to silence it
    assert all(line.startswith("WARNING: ") and f"DISABLE_PLUGINS={way.dist}" in line for line in warnings), warnings


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_who_uses_it_gets_one_message(results, way: Way) -> None:
    found = results[f"{way.name}-used"]
    text = found["err"]
    assert found["status"] == way.status, text
    assert "Traceback" not in text and "Traceback" not in found["out"]
    begin = "WARNING: " if way.warns else "error: "
    assert text.count("WARNING: ") + text.count("error: ") == 1 and begin in text, text
    assert "mistakes in the configuration" not in text and "did you mean" not in text, text
    assert way.dist in text and ("1.2" in text), text
    for part in way.message:
        assert part.format(dist=way.dist) in text if part == REPAIR else part in text, text
    if way.warns:
        assert found["metrics"] == results["none"]["metrics"]
        assert "hello" not in found["out"]


def test_a_name_of_the_core_stays_the_core_s(site, registry, caplog) -> None:
    """Every run asks for `local`, so a plugin of that name must not stop those that never heard of it."""
    source = "from nemo_rl_core.infra.workers.local import LocalLauncher\nclass Own(LocalLauncher): ..."
    site.install("own-dist", entry_points={"launchers": {"local": "own_mod:Own"}}, modules={"own_mod": source})
    assert [registry.resolve("launchers", "local").distribution for _ in range(2)] == ["nemo-rl-core"] * 2
    (record,) = caplog.records
    assert "that of own-dist 1.0 (own-dist:local) is not used" in record.getMessage()
    assert "plugins: {local: 'own-dist:local'}" in record.getMessage()
    chosen = registry.resolve("launchers", "local", plugins={"local": "own-dist:local"})
    assert (chosen.distribution, chosen.load().__name__) == ("own-dist", "Own")


@pytest.mark.parametrize("way", IN_USE, ids=lambda way: way.name)
def test_who_uses_it_gets_one_error_that_names_it(results, way: Use) -> None:
    found = results[f"{way.name}-used"]
    text = found["err"]
    assert found["status"] == way.status, text
    assert "Traceback" not in text and "Traceback" not in found["out"]
    errors, warnings = (
        [line for line in text.splitlines() if line.startswith(start)] for start in ("error: ", "WARNING: ")
    )
    assert (len(errors), len(warnings)) == ((0, 1) if way.status == 0 else (1, way.warnings)), text
    for part in (way.message, way.dist, "1.2"):
        assert part in text, text
    if way.status == 0:
        assert found["metrics"] == results["none"]["metrics"] and found["out"] == results["none"]["out"].replace(
            f"{os.sep}none", f"{os.sep}{way.name}-used"
        )


def test_a_run_among_all_of_them_is_unaffected(results) -> None:
    found, plain = results["among-all"], results["none"]
    assert (found["status"], found["metrics"]) == (0, plain["metrics"])
    datasets = [f"{way.name}_mod" for way in IN_USE if way.kind == "datasets"]  # each is asked for the data
    assert found["imported"] == sorted(["good_mod", *datasets])
    (line,) = found["err"].splitlines()
    assert "latin-dist" in line and "is not UTF-8 text" in line
