"""What benchmarks against another framework share: steps timed in a process of their own for each side."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

__all__ = ["StepClock", "Steps", "device_name", "rate", "save_model", "spawn"]

Steps = list[dict[str, float]]
"""`seconds` and `tokens` of each step."""


class StepClock:
    """Wall-clock time and tokens of each step."""

    def __init__(self) -> None:
        self.rows: Steps = []
        self.tokens = 0.0
        self._last = time.perf_counter()

    def count(self, completions: Sequence[Sequence[int]]) -> None:
        """Add the tokens of the step's completions."""
        self.tokens += sum(len(ids) for ids in completions)

    def tick(self) -> None:
        """End a step."""
        now = time.perf_counter()
        self.rows.append({"seconds": now - self._last, "tokens": self.tokens})
        self._last, self.tokens = now, 0.0


def spawn(script: str, side: str, **arguments: Any) -> Steps:
    """Run one side of `script` in a process of its own and return its steps.

    Args:
        script: Path of the benchmark, which takes `--side`, `--out` and `--scratch`.
        side: Which one.
        arguments: Its further options, `model_folder` as `--model-folder`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "steps.json"
        given = {"scratch": scratch, "out": out, **arguments}
        flags = [item for name, value in given.items() for item in (f"--{name.replace('_', '-')}", str(value))]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
        command = [sys.executable, script, "--side", side, *flags]
        done = subprocess.run(command, env=env, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"The {side} side failed:\n{done.stderr[-4000:]}")
        steps: Steps = json.loads(out.read_text())
        return steps


def rate(steps: Sequence[dict[str, float]]) -> float:
    """Median tokens per second."""
    return statistics.median(step["tokens"] / step["seconds"] for step in steps)


def save_model(name: str, folder: Path, *, head: Literal["lm", "scalar"] = "lm") -> None:
    """Write weights of this shape from scratch, and their tokenizer, as a Hugging Face checkpoint."""
    import torch

    from nemo_rl_core.models import load_model, load_tokenizer

    tokenizer: Any = load_tokenizer(f"scratch:{name}")
    model = load_model(f"scratch:{name}", dtype=torch.float32, seed=0, head=head)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def device_name(device: str = "cpu") -> str:
    """The CUDA device, or the processor."""
    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
