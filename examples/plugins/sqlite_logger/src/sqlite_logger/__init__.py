"""A logger that keeps the metrics of all runs in one SQLite file, to be asked with SQL."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from attrs import frozen

from nemo_rl_core.errors import CheckpointError

__all__ = ["SqliteConfig", "SqliteLogger"]

_TABLES = """
CREATE TABLE IF NOT EXISTS runs (id INTEGER PRIMARY KEY, name TEXT, run_dir TEXT, config TEXT, status TEXT);
CREATE TABLE IF NOT EXISTS metrics (run INTEGER, step INTEGER, name TEXT, value REAL, PRIMARY KEY (run, step, name));
"""


@frozen(kw_only=True)
class SqliteConfig:
    """Options of the logger."""

    path: str | None = None
    """The database; None is `metrics.sqlite` in the run folder."""


class SqliteLogger:
    """Writes runs and metrics. A step that is done again after a resume replaces its earlier numbers.

    Args:
        config: Options; None takes the defaults.
    """

    config_class: ClassVar[type] = SqliteConfig

    def __init__(self, config: SqliteConfig | None = None) -> None:
        self.config = config or SqliteConfig()
        self._database: sqlite3.Connection | None = None
        self._run = 0

    def start(self, run_name: str, run_dir: str, config: Mapping[str, Any]) -> None:
        """Open the database; a run folder that is there already continues its run."""
        path = Path(self.config.path or Path(run_dir) / "metrics.sqlite").expanduser()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = database = sqlite3.connect(path)
            database.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise CheckpointError(f"Cannot open the database {path} ({error}). Set the option `path`.") from error
        found = database.execute("SELECT id FROM runs WHERE run_dir = ?", (str(run_dir),)).fetchone()
        if found is None:
            row = (run_name, str(run_dir), json.dumps(config, default=str))
            found = (database.execute("INSERT INTO runs (name, run_dir, config) VALUES (?, ?, ?)", row).lastrowid,)
        self._run = int(found[0])
        database.commit()

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """One step."""
        if self._database is not None:
            rows = [(self._run, step, name, float(value)) for name, value in metrics.items()]
            self._database.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?)", rows)
            self._database.commit()

    def finish(self, status: str) -> None:
        """Note how the run ended and close the database; may be called twice."""
        if self._database is not None:
            self._database.execute("UPDATE runs SET status = ? WHERE id = ?", (status, self._run))
            self._database.commit()
            self._database.close()
            self._database = None
