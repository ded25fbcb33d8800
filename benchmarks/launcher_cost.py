"""What a step costs more in Ray actors than under the local launcher, on one machine.

Both sides train the same GRPO run: the same seed, so the same rollouts and the same work in each step. Each side is a
process of its own, and they take turns step by step (one waits while the other works), so that a busy moment of the
machine touches both. Starting up and the first step are not counted. Reported is the median over the pairs of steps
of the ratio of their wall-clock times; a step is to take about a second, and the bar is 5 %.

    python benchmarks/launcher_cost.py                  # one and two workers, about five minutes on two cores
    python benchmarks/launcher_cost.py --workers 1 --steps 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "launcher_cost.json"
SIDES = ("local", "ray")
NUM_PROMPTS = 8
GROUP_SIZE = 8
BAR = 1.05


# -- one side, in its own process --------------------------------------------------------------------------


class Turns:
    """Callback: waits for its turn before each step, and tells how long the step took."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel

    def on_step_start(self, run: Any) -> None:
        """Wait for the other side to finish its step."""
        sys.stdin.readline()
        self.started = time.perf_counter()

    def on_step_end(self, run: Any, metrics: dict[str, float]) -> None:
        """Give the turn back."""
        seconds = time.perf_counter() - self.started
        parts = {name.removeprefix("timing/"): value for name, value in metrics.items() if name.startswith("timing/")}
        self.channel.write(json.dumps({"seconds": seconds, "loss": metrics["train/loss"], **parts}) + "\n")
        self.channel.flush()


def run_side(options: argparse.Namespace) -> None:
    """Train under one launcher."""
    from nemo_rl_core.config import finalize, load_config
    from nemo_rl_core.training.run import run
    from nemo_rl_core.training.setup.parts import RunInputs

    rng = random.Random(0)
    rows = [{"prompt": f"{rng.randrange(100, 999)} + {rng.randrange(100, 999)} = "} for _ in range(512)]
    config = {
        "algorithm": "grpo",
        "model": f"scratch:{options.model}",
        "learning_rate": 1e-6,
        "num_prompts_per_step": NUM_PROMPTS,
        "num_generations_per_prompt": GROUP_SIZE,
        "max_steps": options.steps + 1,
        "run_dir": options.run_dir,
        "policy": {"num_workers": options.num_workers},
        "generation": {"max_new_tokens": options.max_new_tokens},
        "cluster": {"launcher": options.side, "device": "cpu", "cpus_per_node": max(2, os.cpu_count() or 1)},
        "checkpointing": {"enabled": False, "export_model": False},
        "logging": {"progress": "none"},
    }
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    inputs = RunInputs(
        train_rows=rows, reward=lambda response: sum(c in "02468" for c in response) / (len(response) + 1)
    )
    run(finalize(load_config(config)), inputs, [Turns(channel)])


# -- the comparison ----------------------------------------------------------------------------------------


def compare(num_workers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn, with this many workers of the policy."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--model", options.model, "--steps", str(options.steps), "--num-workers", str(num_workers)]
        flags += ["--max-new-tokens", str(options.max_new_tokens)]
        sides = {
            side: subprocess.Popen(
                [sys.executable, __file__, "--side", side, "--run-dir", f"{folder}/{side}", *flags],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for side in SIDES
        }  # fmt: skip
        rows: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for step in range(options.steps + 1):
            order = SIDES if step % 2 else tuple(reversed(SIDES))
            for side in order:
                row = take_turn(sides[side], side)
                if step > 0:
                    rows[side].append(row)
        for process in sides.values():
            process.communicate(timeout=120)
    return summary(num_workers, rows)


def take_turn(process: Any, side: str) -> dict[str, float]:
    """One step of one side."""
    process.stdin.write("go\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"The side {side} ended: status {process.wait()}")
    row: dict[str, float] = json.loads(line)
    return row


def summary(num_workers: int, rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """One row of the table."""
    pairs = list(zip(rows["ray"], rows["local"], strict=True))
    ratios = [ray["seconds"] / local["seconds"] for ray, local in pairs]
    stages = sorted(set(rows["ray"][0]) - {"seconds", "loss", "step"})
    return {
        "workers": num_workers,
        "steps": len(pairs),
        "local_seconds": round(statistics.median(row["seconds"] for row in rows["local"]), 3),
        "ray_seconds": round(statistics.median(row["seconds"] for row in rows["ray"]), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
        "within_bar": statistics.median(ratios) <= BAR,
        "largest_loss_difference": max(abs(ray["loss"] - local["loss"]) for ray, local in pairs),
        "stages": {
            side: {name: round(statistics.median(row.get(name, 0.0) for row in rows[side]), 4) for name in stages}
            for side in SIDES
        },
    }


def parse() -> argparse.Namespace:
    """The options of both the comparison and, hidden, of one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2-1m", help="shape of the model")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of policy workers")
    parser.add_argument("--steps", type=int, default=12, help="counted steps of each side")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--results", type=Path, default=RESULTS)
    for hidden in ("--side", "--run-dir"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--num-workers", type=int, default=1, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run one side, or compare."""
    options = parse()
    if options.side:
        run_side(options)
        return
    results = []
    load = [os.getloadavg()[0]]
    for num_workers in options.workers:
        results.append(compare(num_workers, options))
        load.append(os.getloadavg()[0])
        sys.stdout.write(json.dumps(results[-1]) + "\n")
        sys.stdout.flush()
    report = {
        "benchmark": "launcher_cost",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"python": platform.python_version(), "system": platform.system(), "cpus": os.cpu_count()},
        "load_average": [round(value, 1) for value in load],
        "note": "Other work ran on the machine." if load[0] > 1.5 else "",
        "versions": {name: version(name) for name in ("torch", "ray", "nemo-rl-core", "nemo-rl-ray")},
        "model": options.model,
        "rollouts_per_step": NUM_PROMPTS * GROUP_SIZE,
        "bar": BAR,
        "results": results,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
