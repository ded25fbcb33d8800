"""Asynchronous against synchronous training where generation and training take equal time.

Two real processes with a core each: the GRPO trainer, and the PyTorch engine of `generation.num_workers: 1`, on the
10 M model. Nothing sleeps; the engine has places for so many responses at a time that sampling a step's rollouts takes
about as long as training on them, and what each took in the synchronous run is recorded. Bar: 1.7 times the steps per
second.

A second pair of runs stands for devices that this machine does not have: in one process, on the 0.08 M model, a sleep
in each train step and each response, in which the thread computes nothing, as if a GPU did.

    python benchmarks/async_speedup.py [--steps 10] [--device-s 3] [--output benchmarks/results/async_speedup.json]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import nemo_rl
from nemo_rl_core.protocols.generation_backend import GenerationRequest
from nemo_rl_core.records.completion import Completion
from nemo_rl_plugins_dtensor.backend import DTensorBackend
from nemo_rl_plugins_torch_engine.backend import TorchEngine

BAR = 1.7
DEVICE_S = 3.0
"""Seconds that a step's generation and its training each take on their devices; 0 leaves these runs out."""
ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]


class Engine(TorchEngine):
    """The engine, and the time of a device."""

    async def generate(self, request: GenerationRequest) -> Completion:
        """The device takes its time for a whole wave of responses."""
        completion = await super().generate(request)
        await asyncio.sleep(DEVICE_S)
        return completion


class Backend(DTensorBackend):
    """The trainer, and the time of a device."""

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        """The step, then the rest of what a device would take."""
        result = super().train_step(*args, **kwargs)
        time.sleep(DEVICE_S)
        return result


def reward(response: str) -> float:
    """A digit somewhere."""
    return float(any(c.isdigit() for c in response))


PROCESSES = {
    "model": "scratch:qwen2-10m",
    "num_prompts_per_step": 4,
    "num_generations_per_prompt": 6,
    "policy": {"max_sequence_length": 256},
    "generation": {"max_new_tokens": 96, "num_workers": 1},
    "rollouts": {"max_in_flight": 8},
}
DEVICES = {
    "model": "scratch:qwen2-tiny",
    "num_prompts_per_step": 4,
    "num_generations_per_prompt": 4,
    "policy": {"max_sequence_length": 32, "backend": Backend},
    "generation": {"max_new_tokens": 8, "backend": Engine},
    "rollouts": {"max_in_flight": 16},
}


def run(name: str, folder: Path, steps: int, sizes: dict[str, Any], rollouts: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step, over all but the first two."""
    config = {
        **sizes,
        "learning_rate": 1e-4,
        "max_steps": steps,
        "run_dir": str(folder / name),
        "rollouts": {**sizes["rollouts"], **rollouts},
        "loss": {"name": "clipped_pg", "options": {"correction": "tis", "correction_max": 2.0}},
        "logging": {"progress": "none"},
        "checkpointing": {"enabled": False},
    }
    ended: list[float] = []

    class Ends(nemo_rl.Callback):
        def on_step_end(self, run: Any, metrics: dict[str, float]) -> None:
            ended.append(time.perf_counter())

    result = nemo_rl.GRPOTrainer(config).fit(ROWS, reward, callbacks=[Ends()])
    seconds = [b - a for a, b in itertools.pairwise(ended[1:])]
    last = result.history[2:]

    def mean(metric: str) -> float:
        return round(statistics.mean(m.get(metric, 0.0) for m in last), 3)

    return {
        "name": name,
        "step_s": round(statistics.mean(seconds), 4),
        "steps_per_s": round(1 / statistics.mean(seconds), 4),
        "waited_for_rollouts_s": mean("timing/rollouts"),
        "trained_s": round(mean("timing/train") + mean("timing/logprobs"), 3),
        "refit_s": mean("timing/refit"),
        "trainer_idle": mean("async/trainer_idle_fraction"),
        "engine_idle": mean("async/engine_idle_fraction"),
        "age_max": max(m["async/age_max"] for m in last),
    }


def compare(folder: Path, steps: int, sizes: dict[str, Any]) -> dict[str, Any]:
    """Both runs and their ratio."""
    synchronous = run("synchronous", folder, steps, sizes, {})
    asynchronous = run("staleness 1", folder, steps, sizes, {"staleness": 1})
    return {
        "rows": [synchronous, asynchronous],
        "speedup": round(synchronous["step_s"] / asynchronous["step_s"], 3),
    }


def main() -> int:
    """Run both, print, write JSON; status 1 below the bar."""
    global DEVICE_S
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device-s", type=float, default=DEVICE_S)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results") / "async_speedup.json")
    arguments = parser.parse_args()
    DEVICE_S = arguments.device_s
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        processes = compare(Path(folder) / "processes", arguments.steps, PROCESSES)
        devices = compare(Path(folder) / "devices", arguments.steps, DEVICES) if DEVICE_S else None
    reached = processes["speedup"] >= BAR
    result = {
        "machine": {
            "python": platform.python_version(),
            "system": platform.system(),
            "cpus": os.cpu_count(),
            "load_1min": round(os.getloadavg()[0], 1),
        },
        "steps": arguments.steps,
        "two_processes": processes,
        "sleeping_devices": devices and {"device_s": DEVICE_S, **devices},
        "bar": BAR,
        "reached": reached,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
