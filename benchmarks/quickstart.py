"""The quickstart with three seeds: seconds, and held-out accuracy before and after GRPO.

python benchmarks/quickstart.py            # seeds 0, 1, 2; about a quarter of an hour on two cores
python benchmarks/quickstart.py --seeds 0 --generation-backend vllm
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DEFAULT = "torch_engine"
BELOW, ABOVE, SECONDS = 0.35, 0.9, 300.0


def run(seed: int, generation_backend: str) -> dict[str, Any]:
    """One quickstart through the command line, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "nemo_rl_core.cli", "quickstart", "--json", "--seed", str(seed)]
        further = ["--generation-backend", generation_backend, "--run-dir", folder]
        done = subprocess.run([*command, *further], capture_output=True, text=True, check=True)
        row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    row["within_bounds"] = row["accuracy_before"] < BELOW and row["accuracy_after"] > ABOVE and row["seconds"] < SECONDS
    return {name: value for name, value in row.items() if name not in ("report", "model")}


def main() -> None:
    """Run the seeds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--generation-backend", default=DEFAULT)
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        rows.append(run(seed, options.generation_backend))
        row = rows[-1]
        print(
            f"seed {seed}: {row['accuracy_before']:.3f} -> {row['accuracy_after']:.3f} "
            f"(greedy {row['greedy_before']:.3f} -> {row['greedy_after']:.3f}) in {row['seconds']:.0f} s",
            flush=True,
        )
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "load_1m": os.getloadavg()[0]}
    bounds = {"accuracy_before_below": BELOW, "accuracy_after_above": ABOVE, "seconds_below": SECONDS}
    name = "quickstart" if options.generation_backend == DEFAULT else f"quickstart_{options.generation_backend}"
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"machine": machine, "bounds": bounds, "rows": rows}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
