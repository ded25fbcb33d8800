"""The examples run as they stand and with the overrides that they tell of, and the student learns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[4] / "examples" / "algorithms"
pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path):
    """First and last value of each metric that an example prints."""

    def call(script, *overrides):
        command = [sys.executable, "-P", str(EXAMPLES / script), "logging.progress=none", *overrides]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines() if " at first, " in line]
        return {line[0]: (float(line[1]), float(line[4])) for line in lines}

    return call


def test_the_example(run):
    found = run("distillation.py")
    divergence, reward = found["train/divergence"], found["reward/mean"]
    assert divergence[1] < 0.5 * divergence[0]
    assert reward[1] > reward[0]


def test_off_policy_over_the_whole_vocabulary(run):
    found = run("distillation.py", "lmbda=0", "top_k=null", "max_steps=20")
    assert found.keys() == {"train/divergence"}
    assert found["train/divergence"][1] < 0.5 * found["train/divergence"][0]


def test_across_tokenizers(run):
    found = run("cross_tokenizer_distillation.py", "max_steps=25")
    divergence, aligned = found["train/divergence"], found["train/aligned_fraction"]
    assert divergence[1] < 0.5 * divergence[0]
    assert aligned[1] > 0.95
