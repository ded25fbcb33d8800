"""The example of the family runs for each name, and what it trains learns."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[4] / "examples" / "algorithms" / "policy_gradient.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo", "dr_grpo", "rloo", "reinforce_pp"])
def test_the_example_learns(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    runpy.run_path(str(EXAMPLE))["main"]([f"algorithm={name}", "logging.progress=none"])
    first, last = (float(word) for word in capsys.readouterr().out.split() if word.replace(".", "").isdigit())
    assert last > first + 0.2


def test_another_name_is_told_what_there_is():
    with pytest.raises(SystemExit, match="algorithm=ppo: this example is for grpo, dapo"):
        runpy.run_path(str(EXAMPLE))["main"](["algorithm=ppo"])
