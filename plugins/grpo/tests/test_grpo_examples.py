"""The examples of the family run as scripts, and what they train learns."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "algorithms"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo", "dr_grpo", "rloo", "reinforce_pp"])
def test_the_example_learns(name, tmp_path):
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "run_dir=run", "logging.progress=none"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = (float(word) for word in done.stdout.split() if word.replace(".", "").isdigit())
    assert last > first + 0.2
