"""The examples of training on rows run as scripts, and learn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "algorithms"

pytestmark = pytest.mark.slow


def lines(tmp_path, script, *arguments):
    """The first and the last number of each line that tells of progress."""
    command = [sys.executable, EXAMPLES / script, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # more only get in each other's way in a model this small
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(map(float, found)) for found in re.findall(r"([\d.-]+) at first, ([\d.-]+) at last", done.stdout)]


def test_sft(tmp_path):
    ((first, last),) = lines(tmp_path, "sft.py", "max_steps=40", "logging.progress=none")
    assert last < 0.5 * first


def test_dpo(tmp_path):
    ((_, last),) = lines(tmp_path, "dpo.py", "max_steps=20", "logging.progress=none")
    assert last > 0.9


def test_reward_model(tmp_path):
    (_, accuracy), (score, learned) = lines(tmp_path, "reward_model.py", str(tmp_path))
    assert accuracy > 0.9
    assert learned > score + 0.5
