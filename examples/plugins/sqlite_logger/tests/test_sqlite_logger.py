from __future__ import annotations

import sqlite3

import pytest
from sqlite_logger import SqliteConfig, SqliteLogger

from nemo_rl_core.testing import LoggerContract


def rows(path, query):
    with sqlite3.connect(path) as database:
        return database.execute(query).fetchall()


class TestContract(LoggerContract):
    """Everything that the core expects of a logger."""

    @pytest.fixture
    def logger(self):
        return SqliteLogger()

    def read_back(self, logger, run_dir):
        found: dict[int, dict[str, float]] = {}
        for step, name, value in rows(run_dir / "metrics.sqlite", "SELECT step, name, value FROM metrics"):
            found.setdefault(step, {})[name] = value
        return found


def test_steps_done_again_replace_the_earlier_ones(tmp_path):
    path = tmp_path / "all.sqlite"
    for value in (1.0, 2.0):  # the second is a run that resumed before step 3
        logger = SqliteLogger(SqliteConfig(path=str(path)))
        logger.start("name", str(tmp_path / "run"), {"seed": 1})
        logger.log({"train/loss": value}, step=3)
        logger.finish("completed")
    assert rows(path, "SELECT step, name, value FROM metrics") == [(3, "train/loss", 2.0)]
    assert rows(path, "SELECT name, status FROM runs") == [("name", "completed")]


def test_by_default_the_file_is_in_the_run_folder(tmp_path):
    logger = SqliteLogger()
    logger.start("name", str(tmp_path), {})
    logger.finish("failed")
    assert (tmp_path / "metrics.sqlite").is_file()
