"""Start-up times: what a user waits for before anything happens, against the budgets of design.md section 8.

    python benchmarks/startup.py [--runs 15] [--output benchmarks/results/startup.json]

Each command runs in a process of its own, the commands taking turns, so that a busy moment of the machine
touches all of them. Reported are the medians of the wall-clock time and of the processor time. Budgets are
held against the processor time: starting waits for nothing, so on an idle machine the two are equal, and
on a busy one only the second says what the start costs. A bare `python -c pass` stands beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nemo_rl_core.testing.site import PluginSite

HELP = "import sys; from nemo_rl_core.cli import main; code = main(['--help']); "
LIST = "import sys; from nemo_rl_core.cli import main; code = main(['plugins', 'list']); "
NO_TORCH = "assert not {'torch', 'transformers'} & set(sys.modules), 'torch was imported'; sys.exit(code)"

COMMANDS: dict[str, tuple[str, int, float | None]] = {
    # name: (code, synthetic plugins installed, budget in ms)
    "python -c pass": ("pass", 0, None),
    "import nemo_rl_core": ("import nemo_rl_core", 0, 50.0),
    "import nemo_rl_core.registry": ("import nemo_rl_core.registry", 0, None),
    "nemo-rl --help": (HELP + NO_TORCH, 15, 150.0),
    "nemo-rl plugins list, 15 plugins": (LIST + NO_TORCH, 15, 250.0),
}

DISCOVERY = """
import time
from nemo_rl_core.registry.discovery._index import Index, Selection
started, cpu = time.perf_counter(), time.process_time()
index = Index(Selection())
print((time.perf_counter() - started) * 1e3, (time.process_time() - cpu) * 1e3, len(index.distributions))
"""
DISCOVERY_BUDGET_MS = 30.0


def install(folder: Path, count: int) -> PluginSite:
    """`count` distributions, each with a loss and a reward."""
    folder.mkdir()
    site = PluginSite(folder)
    for i in range(count):
        points = {"losses": {f"loss_{i}": f"plugin_{i}.loss:Loss"}, "rewards": {f"reward_{i}": f"plugin_{i}:reward"}}
        site.install(f"synthetic-{i}", entry_points=points, requires=["nemo-rl-core>=0.1", "torch>=2.7"])
    return site


def timed(code: str, site: Path) -> tuple[float, float]:
    """Wall-clock and processor milliseconds of one process, its start included."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    before, started = _children_cpu(), time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    elapsed = ((time.perf_counter() - started) * 1e3, (_children_cpu() - before) * 1e3)
    if done.returncode != 0:
        raise SystemExit(f"{code!r} failed:\n{done.stderr}")
    return elapsed


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(runs: int) -> list[dict[str, object]]:
    """One row per command, and one for the discovery alone."""
    with tempfile.TemporaryDirectory() as scratch:
        sites = {n: install(Path(scratch, f"site{n}"), n).path for n in (0, 15, 200)}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
        for number in range(runs + 1):
            for name, (code, plugins, _) in COMMANDS.items():
                elapsed = timed(code, sites[plugins])
                if number:  # the first round warms the file cache and writes bytecode
                    times[name].append(elapsed)
        environment = {**os.environ, "PYTHONPATH": str(sites[200])}
        found = [
            subprocess.run(
                [sys.executable, "-c", DISCOVERY], env=environment, capture_output=True, text=True, check=True
            )
            for _ in range(runs)
        ]
    rows = [row(name, values, COMMANDS[name][2]) for name, values in times.items()]
    wall, cpu, distributions = zip(*(map(float, each.stdout.split()) for each in found), strict=True)
    name = f"discovery, {int(distributions[0])} plugin distributions"
    return [*rows, row(name, list(zip(wall, cpu, strict=True)), DISCOVERY_BUDGET_MS)]


def row(name: str, times: list[tuple[float, float]], budget: float | None) -> dict[str, object]:
    """Medians and budget of one measurement, from (wall, processor) times."""
    wall, cpu = (statistics.median(each) for each in zip(*times, strict=True))
    return {
        "name": name,
        "wall_ms": round(wall, 1),
        "cpu_ms": round(cpu, 1),
        "budget_ms": budget,
        "within_budget": None if budget is None else cpu <= budget,
    }


def main() -> int:
    """Measure, print a table, write JSON; status 1 if a budget is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results") / "startup.json")
    arguments = parser.parse_args()
    rows = measure(arguments.runs)
    machine = {"python": platform.python_version(), "system": platform.system(), "cpus": os.cpu_count()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": machine, "runs": arguments.runs, "rows": rows}, indent=2) + "\n")
    for each in rows:
        budget = "" if each["budget_ms"] is None else f"budget {each['budget_ms']:g} ms"
        verdict = {True: "ok", False: "EXCEEDED", None: ""}[each["within_budget"]]  # type: ignore[index]
        sys.stdout.write(
            f"{each['name']:45} wall {each['wall_ms']:>7} ms  cpu {each['cpu_ms']:>7} ms  {budget:15} {verdict}\n"
        )
    return 1 if any(each["within_budget"] is False for each in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
