"""The record of a run on disk: metrics, configuration, manifest, rollouts.

`metrics.jsonl` has one line a step. A run that is resumed from step s does the later steps again; of lines
with one step number the last counts, and `read_metrics` returns only those.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl_core.errors import CheckpointError
from nemo_rl_core.registry import PluginCall

if TYPE_CHECKING:
    from nemo_rl_core.protocols.logger import Logger
    from nemo_rl_core.records.rollout import RolloutGroup

__all__ = ["RunRecord", "read_metrics"]

logger = logging.getLogger(__name__)


class RunRecord:
    """Writes the run folder and feeds the loggers.

    Args:
        run_dir: Created if missing.
        loggers: Name and logger; one that raises is named in a warning and left out from then on.
    """

    def __init__(self, run_dir: Path, loggers: Sequence[tuple[str, Logger]] = ()) -> None:
        self.run_dir = run_dir
        self._loggers = list(loggers)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"Cannot create the run folder {run_dir}: {error.strerror}. Set run_dir to a folder you may write."
            ) from error

    def start(self, name: str, config: Mapping[str, Any], manifest: Sequence[Mapping[str, Any]]) -> None:
        """Write configuration and manifest; start the loggers."""
        self._write_json("config.json", config)
        self._write_json("manifest.json", list(manifest))
        for label, backend in list(self._loggers):
            self._guarded(label, backend, "start", name, str(self.run_dir), config)

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Write the metrics of one step; the loggers get only those that are finite."""
        line = json.dumps({"step": step, **metrics})
        with (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        for label, backend in list(self._loggers):
            self._guarded(label, backend, "log", finite, step=step)

    def rollouts(self, groups: Sequence[RolloutGroup], *, step: int) -> None:
        """Write all rollouts of one step, as JSON lines."""
        from nemo_rl_core.records.jsonl import write_groups

        folder = self.run_dir / "rollouts"
        folder.mkdir(exist_ok=True)
        write_groups(folder / f"step_{step}.jsonl", groups)

    def finish(self, status: str) -> None:
        """End the loggers."""
        for label, backend in list(self._loggers):
            self._guarded(label, backend, "finish", status)

    def _write_json(self, name: str, data: object) -> None:
        (self.run_dir / name).write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")

    def _guarded(self, label: str, backend: Logger, method: str, *args: object, **kwargs: object) -> None:
        try:
            with PluginCall("loggers", backend, method):
                getattr(backend, method)(*args, **kwargs)
        except Exception as error:  # a logger must not end a run
            logger.warning("Logger %s failed in %s() and is left out from now on: %r", label, method, error)
            self._loggers = [entry for entry in self._loggers if entry[1] is not backend]


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return the metrics of each step of a run, in order; a last line cut off by a crash is skipped."""
    path = run_dir / "metrics.jsonl"
    by_step: dict[int, dict[str, float]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            by_step[int(entry["step"])] = entry
    return [by_step[step] for step in sorted(by_step)]
