"""Ten thousand simulated schedules with faults, deaths and resumes: nothing lost, doubled, too old or stuck.

The test-suite runs the first thousand; this runs more and counts what the schedules covered.

    python benchmarks/simulated_schedules.py [--schedules 10000] [--output benchmarks/results/simulated_schedules.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path

from nemo_rl_core.testing.schedules import run_schedule


def main() -> int:
    """Run, print, write JSON; status 1 if a schedule broke a rule."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results") / "simulated_schedules.json")
    arguments = parser.parse_args()
    began, cpu = time.perf_counter(), time.process_time()
    lives: Counter[int] = Counter()
    steps = groups = 0
    virtual_s = 0.0
    violations = []
    for seed in range(arguments.first, arguments.first + arguments.schedules):
        report = run_schedule(seed)
        lives[report.num_lives] += 1
        steps, groups, virtual_s = steps + report.num_steps, groups + report.num_groups, virtual_s + report.seconds
        if report.violations:
            violations.append({"seed": seed, "violations": report.violations})
            sys.stdout.write(f"seed {seed}: {report.violations}\n")
    result = {
        "machine": {"python": platform.python_version(), "system": platform.system(), "cpus": os.cpu_count()},
        "schedules": arguments.schedules,
        "violations": violations,
        "steps": steps,
        "groups_trained": groups,
        "schedules_by_lives": {str(n): lives[n] for n in sorted(lives)},
        "virtual_hours": round(virtual_s / 3600, 1),
        "wall_s": round(time.perf_counter() - began, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps({k: v for k, v in result.items() if k != "machine"}) + "\n")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
