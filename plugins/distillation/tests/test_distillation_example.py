"""The example runs as it stands, and its student learns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "examples" / "algorithms" / "distillation.py"


@pytest.mark.slow
def test_the_example(tmp_path):
    command = [sys.executable, "-P", str(SCRIPT), "logging.progress=none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if " at first, " in line]
    found = {line[0]: (float(line[1]), float(line[4])) for line in lines}
    divergence, reward = found["train/divergence"], found["reward/mean"]
    assert divergence[1] < 0.5 * divergence[0]
    assert reward[1] > reward[0]
