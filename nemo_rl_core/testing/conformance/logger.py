"""The contract of a logger.

A logger that raises is left out for the rest of the run, so what it cannot take is lost without a word in the
dashboard. The clauses are what a run hands over, odd things included.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, ParamSpec

import pytest

from nemo_rl_core.errors import NemoRLError
from nemo_rl_core.protocols.logger import Logger
from nemo_rl_core.testing.conformance.frame.kit import Contract

__all__ = ["LoggerContract"]

_P = ParamSpec("_P")

CONFIG = {
    "algorithm": "x",
    "seed": 1,
    "learning_rate": 1e-6,
    "enabled": True,
    "nothing": None,
    "betas": (0.9, 0.999),
    "stages": [{"rows": 3}, {"rows": 4}],
    "policy": {"model_name": "a/b", "options": {}, "path": Path("model")},
    "a.dotted/name": math.inf,
}
"""A configuration as a run passes it: nested, with values that JSON does not have."""

STEPS: tuple[tuple[int, Mapping[str, float]], ...] = (
    (1, {"train/loss": 0.5, "train/reward": 0.25, "timing/total": 1.5}),
    (2, {"train/loss": 0.25, "train/reward": 0.5, "timing/total": 1.25, "validation/accuracy": 0.75}),
    (3, {"train/loss": -0.125, "train/reward": 1.0, "timing/total": 1.0}),
)
"""Metrics of three steps; they need not have the same names."""

ODD_METRICS = {
    "x": 1.0,
    "a name/with blanks": 2.0,
    "env/\u00fcn\u00efcode \u2713": 3.0,
    "deep/er/and/deeper": 4.0,
    "sign=%s&?#{}[]\"'\\": 5.0,
    "reward/" + "long_" * 60: 6.0,
    "tiny": 5e-324,
    "huge": 1e300,
    "whole": 3,
    "minus_zero": -0.0,
}
"""Names are made by environments and rewards of other people."""


class LoggerContract(Contract):
    """What every logger must be. Define the fixture `logger`; override `read_back` if it can be read."""

    kind: ClassVar[str] = "loggers"
    subject: ClassVar[str] = "logger"

    def read_back(self, logger: Logger, run_dir: Path) -> Mapping[int, Mapping[str, float]] | None:
        """Return the logged metrics by step, read back from the store; None if that is impossible. Default: None."""
        return None

    # -- clauses -------------------------------------------------------------------------------

    def test_takes_the_calls_of_a_run(self, logger: Logger) -> None:
        """It has `start`, `log` and `finish`, plain functions with the arguments of the protocol."""
        calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
            "start": (("run", "folder", {}), {}),
            "log": (({},), {"step": 1}),
            "finish": (("completed",), {}),
        }
        for name, (arguments, keywords) in calls.items():
            method = getattr(logger, name, None)
            assert callable(method), f"it has no method {name}"
            assert not inspect.iscoroutinefunction(method), f"{name} is async; loggers are called, not awaited"
            try:
                inspect.signature(method).bind(*arguments, **keywords)
            except TypeError as error:
                raise AssertionError(f"{name} cannot be called as a run does: {error}") from error

    @pytest.mark.parametrize("status", ["completed", "interrupted", "failed"])
    def test_whole_run(self, logger: Logger, tmp_path: Path, status: str) -> None:
        """It takes a whole run, whichever way it ends."""
        self._run(logger, tmp_path, status)

    def test_finish_twice(self, logger: Logger, tmp_path: Path) -> None:
        """It may be finished again, as when shutting down fails half-way."""
        self._run(logger, tmp_path, "failed")
        self._call("finishing it again", logger.finish, "failed")

    def test_finish_before_start(self, logger: Logger) -> None:
        """It may be finished without having been started, as when a run fails before its first step."""
        self._call("finishing it before it was started", logger.finish, "failed")

    def test_any_config(self, logger: Logger, tmp_path: Path) -> None:
        """It takes any configuration: nested, with None, paths and infinity, and objects it does not know."""
        strange: dict[Any, Any] = {
            **CONFIG,
            "object": object(),
            "class": Path,
            "function": len,
            7: "a key that is no text",
        }
        self._call("starting with a strange configuration", logger.start, "run", str(tmp_path), strange)
        self._call("finish", logger.finish, "completed")

    def test_odd_metrics(self, logger: Logger, tmp_path: Path) -> None:
        """It takes metrics of any name, and very small and very large numbers."""
        self._start(logger, tmp_path)
        for number, (name, value) in enumerate(ODD_METRICS.items()):
            self._call(f"logging {name[:40]!r}", logger.log, {name: value}, step=number)
        self._call("finish", logger.finish, "completed")

    def test_step_without_metrics(self, logger: Logger, tmp_path: Path) -> None:
        """It takes a step without any metric."""
        self._start(logger, tmp_path)
        self._call("logging no metric", logger.log, {}, step=1)
        self._call("finish", logger.finish, "completed")

    def test_steps_again(self, logger: Logger, tmp_path: Path) -> None:
        """A resumed run does some steps again: it takes a step number that it had before."""
        self._start(logger, tmp_path)
        for step in (1, 2, 3, 2, 3, 4):
            self._call(f"logging step {step} again", logger.log, {"train/loss": float(step)}, step=step)
        self._call("finish", logger.finish, "completed")

    def test_numbers_round_trip(self, logger: Logger, tmp_path: Path) -> None:
        """What is logged can be read back: every step, every name, every number."""
        self._run(logger, tmp_path, "completed")
        found = self.read_back(logger, tmp_path)
        if found is None:
            pytest.skip("`read_back` says that it cannot be read")
        assert list(found) == [step for step, _ in STEPS], f"the steps read back are {list(found)}"
        for step, metrics in STEPS:
            back = found[step]
            assert set(back) == set(metrics), f"step {step} has {sorted(back)}, logged were {sorted(metrics)}"
            for name, value in metrics.items():
                close = math.isclose(back[name], value, rel_tol=1e-6)  # a store of float32 will do
                assert close, f"`{name}` of step {step} is {back[name]}, logged was {value}"

    def test_inputs_are_left_alone(self, logger: Logger, tmp_path: Path) -> None:
        """It changes neither the configuration nor the metrics, which the run and other loggers read after it."""
        config, metrics = copy.deepcopy(CONFIG), dict(STEPS[0][1])
        logger.start("run", str(tmp_path), config)
        logger.log(metrics, step=1)
        logger.finish("completed")
        assert config == CONFIG, "it changed the configuration"
        assert metrics == STEPS[0][1], f"it changed the metrics to {metrics}"

    def test_folder_it_cannot_write(self, logger: Logger, tmp_path: Path) -> None:
        """A folder that cannot be written is told by a `NemoRLError`, when the run starts or at the first step."""
        (tmp_path / "file").write_text("not a folder")
        run_dir = tmp_path / "file" / "run"
        try:
            logger.start("run", str(run_dir), CONFIG)
            for step, metrics in STEPS:
                logger.log(metrics, step=step)
        except NemoRLError as error:
            assert str(error), "its error says nothing"
        except Exception as error:
            raise AssertionError(
                f"for a run folder below a file it raised {type(error).__name__}: {error}; raise a NemoRLError that "
                "says which folder and what to do"
            ) from error
        self._call("finishing it after that", logger.finish, "failed")

    # -- calling -------------------------------------------------------------------------------

    def _run(self, logger: Logger, run_dir: Path, status: str) -> None:
        self._start(logger, run_dir)
        for step, metrics in STEPS:
            self._call(f"logging step {step}", logger.log, metrics, step=step)
        self._call(f"finishing a run that {status}", logger.finish, status)

    def _start(self, logger: Logger, run_dir: Path) -> None:
        self._call("starting", logger.start, "run", str(run_dir), copy.deepcopy(CONFIG))

    def _call(self, what: str, method: Callable[_P, object], *arguments: _P.args, **keywords: _P.kwargs) -> None:
        try:
            method(*arguments, **keywords)
        except Exception as error:
            raise AssertionError(f"{what} raised {type(error).__name__}: {error}") from error
