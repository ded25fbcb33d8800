"""The run folder: what is written survives restarts and loggers that fail."""

from __future__ import annotations

import json

import pytest

from nemo_rl_core.errors import CheckpointError
from nemo_rl_core.training.reporting.record import RunRecord, read_metrics


class ListLogger:
    def __init__(self) -> None:
        self.events: list[tuple] = []

    def start(self, run_name, run_dir, config):
        self.events.append(("start", run_name))

    def log(self, metrics, *, step):
        self.events.append(("log", step, dict(metrics)))

    def finish(self, status):
        self.events.append(("finish", status))


class BrokenLogger(ListLogger):
    def log(self, metrics, *, step):
        raise OSError("no route to host")


def test_the_last_line_of_a_step_counts_and_a_cut_line_is_skipped(tmp_path):
    record = RunRecord(tmp_path)
    record.log({"loss": 3.0}, step=1)
    record.log({"loss": 2.0}, step=2)
    record.log({"loss": 1.0}, step=2)  # done again after a resume from step 1
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.0}]


def test_loggers_get_only_finite_numbers(tmp_path):
    logger = ListLogger()
    record = RunRecord(tmp_path, [("list", logger)])
    record.start("run", {"seed": 1}, [])
    record.log({"a": 1.0, "b": float("nan")}, step=1)
    record.finish("completed")
    assert logger.events == [("start", "run"), ("log", 1, {"a": 1.0}), ("finish", "completed")]
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 1}


def test_a_logger_that_fails_is_named_once_and_the_others_go_on(tmp_path, caplog):
    good, bad = ListLogger(), BrokenLogger()
    record = RunRecord(tmp_path, [("bad", bad), ("good", good)])
    for step in (1, 2):
        record.log({"a": 1.0}, step=step)
    assert [e[1] for e in good.events] == [1, 2]
    assert caplog.text.count("Logger bad failed in log()") == 1


def test_a_run_folder_that_cannot_be_made_is_an_error_with_the_fix(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot create the run folder.*Set run_dir"):
        RunRecord(tmp_path / "file" / "run")
