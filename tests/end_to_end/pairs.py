"""Runs of pairs of backends, each made once; the pairs themselves are those of `benchmarks/backend_pairs.py`."""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path

import cloudpickle

ROOT = Path(__file__).resolve().parents[2]


def load_pairs():
    """The benchmark as a module, whose reward travels to other processes by value."""
    name = "backend_pairs"
    if name not in sys.modules:
        spec = util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        sys.modules[name] = util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        cloudpickle.register_pickle_by_value(sys.modules[name])
    return sys.modules[name]


class Runs:
    """Runs by pair; a second question about one does not run it again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found = {}

    def __call__(self, training, generation, launcher):
        pairs = load_pairs()
        pair = pairs.Pair(training, generation, launcher)
        if pair not in self._found:
            self._found[pair] = pairs.run_pair(pair, self._folder / "-".join(pair))
        return self._found[pair]


def check_pair(training, generation, launcher, result):
    """What holds of every pair."""
    pairs = load_pairs()
    row = pairs.row_of(pairs.Pair(training, generation, launcher), result)
    assert result.status == "completed"
    assert row["steps"] == pairs.STEPS
    assert row["on_policy"], pairs.sampled_versions(result)
    assert 1.0 <= row["mismatch"] < pairs.MISMATCH_BAR
    assert all(abs(entry["train/probs_ratio"] - 1.0) < 1e-4 for entry in result.history)
    assert all(entry["train/grad_norm"] > 0 for entry in result.history)
    assert (result.model_path / "model.safetensors").is_file()


def check_same_run(one, other):
    """Step by step the same, and so are the weights in the end."""
    for name in ("reward/mean", "train/loss", "train/grad_norm", "rollouts/response_tokens_mean"):
        assert [e[name] for e in one.history] == [e[name] for e in other.history], name
    files = [result.model_path / "model.safetensors" for result in (one, other)]
    assert files[0].read_bytes() == files[1].read_bytes()


def check_same_first_step(one, other):
    """The same rollouts and the same update from them, by two trainers."""
    first, second = one.history[0], other.history[0]
    for name in ("reward/mean", "rollouts/response_tokens_mean"):
        assert first[name] == second[name], name
    for name in ("train/loss", "train/grad_norm"):
        assert abs(first[name] - second[name]) < 1e-5, name
