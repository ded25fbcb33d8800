"""Components of a script, of standard input and of notebook cells: in the driver, in workers, in the process pool."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nemo_rl_core.config import load_config
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.training.reporting.record import read_metrics

pytestmark = pytest.mark.xdist_group("user_code")  # one worker makes what they share

CELLS = [
    """
    import os
    import torch
    torch.set_num_threads(1)
    from attrs import frozen
    from nemo_rl_core.schema.run import RunConfig, component
    from nemo_rl_core.records.to_batch import batch_from_groups
    from nemo_rl_core.protocols.algorithm import BaseAlgorithm
    from nemo_rl_core.protocols.loss import LossSums, Metric
    from nemo_rl_core.registry import (
        register_advantage, register_algorithm, register_dataset, register_logger, register_loss, register_reward,
    )
    from nemo_rl_core.training.trainer import Trainer
    """,
    """
    FACTOR = 2.0
    def scaled(x):
        return FACTOR * x

    @register_loss("cell_loss")
    class CellLoss:
        denominator = "tokens"
        needs = frozenset({"logprobs"})
        def __call__(self, outputs, batch):
            mask = batch["loss_mask"]
            total = scaled(-(outputs.logprobs * batch["advantages"]).masked_fill(~mask, 0.0).sum())
            return LossSums(total, {"pid": Metric(float(os.getpid()), 1.0, "max")})
    """,
    """
    @frozen(kw_only=True)
    class CellConfig(RunConfig):
        num_prompts_per_step: int = 4
        loss: object = component("losses", "cell_loss")
        advantage: object = component("advantages", "cell_advantage")
        @property
        def num_items_per_step(self):
            return self.num_prompts_per_step
        @property
        def group_size(self):
            return 4

    @register_algorithm("cell_algorithm")
    class CellAlgorithm(BaseAlgorithm):
        config_class = CellConfig
        def __init__(self, config, context):
            super().__init__(config, context)
            self.loss = context.resolve("losses", config.loss)
            self.advantage = context.resolve("advantages", config.advantage)
        def build_batch(self, items):
            return batch_from_groups(items)
        def finish_batch(self, batch):
            batch.set_tokens("advantages", self.advantage(batch))
            return {}

    @register_advantage("cell_advantage")
    class CellAdvantage:
        def __call__(self, batch):
            return batch.expand_to_tokens(batch["rewards"] - batch["rewards"].mean()) * batch["loss_mask"]
    """,
    """
    GOOD = set("0123456789")
    def is_good(letter):
        return letter in GOOD

    @register_reward("cell_reward")
    def cell_reward(response):
        return {"digits": float(any(is_good(letter) for letter in response)), "pid": float(os.getpid() % 7) * 0.0}

    @register_dataset("cell_rows")
    def cell_rows():
        return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]

    @register_logger("cell_logger")
    class CellLogger:
        config_class = dict
        def __init__(self, config): ...
        def start(self, run_name, run_dir, config): self.path = run_dir + "/cell.txt"
        def log(self, metrics, *, step): open(self.path, "a").write(f"{step} {metrics['train/loss']}\\n")
        def finish(self, status): ...
    """,
    """
    result = Trainer({
        "algorithm": "cell_algorithm", "model": "scratch:qwen2-tiny", "learning_rate": 1e-3, "max_steps": 2,
        "run_dir": os.environ["RUN_DIR"],
        "policy": {"max_sequence_length": 32, "num_workers": int(os.environ["WORKERS"])},
        "generation": {"max_new_tokens": 4}, "logging": {"progress": "none", "loggers": ["cell_logger"]},
        "reward": "cell_reward", "data": {"train": {"source": "cell_rows"}}, "checkpointing": {"export_model": False},
    }).fit()
    print("driver", os.getpid(), "workers", int(result.metrics["train/pid"]))
    """,
]
SCRIPT = "".join(textwrap.dedent(cell) for cell in CELLS)

KERNEL = """
import json, sys, types
# As in a notebook: __main__ has no file, each cell is compiled under a name of its own.
main = sys.modules["__main__"]
del main.__dict__["__file__"]
for number, cell in enumerate(json.load(open("cells.json"))):
    exec(compile(cell, f"/tmp/ipykernel_1/{number}.py", "exec"), main.__dict__)
"""


def run(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    script = folder / ("kernel.py" if how == "cells" else "train_mine.py")
    script.write_text(KERNEL if how == "cells" else SCRIPT)
    (folder / "cells.json").write_text(json.dumps([textwrap.dedent(cell) for cell in CELLS]))
    return subprocess.run(
        [sys.executable, "-" if how == "stdin" else str(script)],
        input=SCRIPT if how == "stdin" else None,
        cwd=folder,
        env={
            **os.environ,
            "RUN_DIR": str(folder / "run"),
            "WORKERS": "1" if how == "stdin" else "2",
            "NEMO_RL_DEBUG": "1",
        },
        capture_output=True,
        text=True,
        timeout=110,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The same run from a script and from cells on two worker processes, and from standard input on one."""
    folders = {}
    for how in ("script", "stdin", "cells"):
        folders[how] = tmp_path_factory.mktemp(how)
        done = run(folders[how], how)
        assert done.returncode == 0, done.stderr[-3000:]
        _, driver, _, worker = done.stdout.split()
        assert (driver == worker) == (how == "stdin")  # the loss ran in another process
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stdin", "cells"])
def test_every_way_takes_the_same_steps(runs, how):
    names = ("train/loss", "train/grad_norm", "reward/mean", "reward/digits/mean")
    script, other = (
        [{n: m[n] for n in names if n in m} for m in read_metrics(runs[h] / "run")] for h in ("script", how)
    )
    assert len(script) == len(other) == 2 and script[0]["train/grad_norm"] > 0
    for mine, theirs in zip(other, script, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert len((runs[how] / "run" / "cell.txt").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "where", "fix"),
    [
        ("script", r"defined in the file .*train_mine\.py", r"again by `python .*train_mine\.py`"),
        ("stdin", "defined in a notebook, an interpreter or standard input", "the cells or the script that define it"),
        ("cells", "defined in a notebook, an interpreter or standard input", "the cells or the script that define it"),
    ],
)
def test_resume_without_the_code_says_what_is_missing(runs, how, where, fix):
    with pytest.raises(ConfigError) as caught:
        load_config(runs[how] / "run" / "config.json")
    text = str(caught.value)
    for kind, name, value in (
        ("algorithm", "cell_algorithm", "__main__:CellAlgorithm"),
        ("reward", "cell_reward", "__main__:cell_reward"),
        ("logger", "cell_logger", "__main__:CellLogger"),
    ):
        assert (
            f"The {kind} {name!r} is user code that is not here: the run in {runs[how] / 'run'} had it as {value}"
            in text
        )
        assert f"[nemo_rl.{kind}s]" in text
    assert re.search(where, text) and re.search(fix, text)


@pytest.mark.slow
def test_the_trace_holds_what_ran_in_the_workers(runs):
    rows = [json.loads(line) for line in (runs["script"] / "run" / "debug.jsonl").read_text().splitlines()]
    losses = [row for row in rows if row["kind"] == "losses" and row["call"] == "__call__"]
    assert {row["process"] for row in losses} == {"policy rank 0", "policy rank 1"} and len(losses) == 4
    assert {(row["value"], row["distribution"]) for row in losses} == {("__main__:CellLoss", None)}
    assert any(row["kind"] == "rewards" and row["name"] == "cell_reward" for row in rows)


def test_another_name_is_not_explained_by_a_manifest(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps([{"kind": "losses", "name": "mine", "distribution": None}]))
    with pytest.raises(ConfigError, match="No algorithm named 'other'") as caught:
        load_config({"algorithm": "other", "run_dir": str(tmp_path)})
    assert "user code" not in str(caught.value)
