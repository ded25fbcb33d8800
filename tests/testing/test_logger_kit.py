"""The contract of a logger against loggers broken on purpose, one at least for each clause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_rl_core.errors import CheckpointError
from nemo_rl_core.testing import LoggerContract, run_kit
from nemo_rl_core.testing.conformance.frame.kit import clauses


class Lines:
    """Writes JSON lines."""

    config_class = dict

    def __init__(self, config=None):
        self.file = None

    def start(self, run_name, run_dir, config):
        self.open(Path(run_dir))
        self.file.write(json.dumps(self.plain(config)) + "\n")

    def open(self, folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = (folder / "log.jsonl").open("w")
        except OSError as error:
            raise CheckpointError(f"Cannot write to the run folder {folder}: {error}. Set another.") from error

    def plain(self, config):
        return {str(name): repr(value) for name, value in config.items()}

    def log(self, metrics, *, step):
        self.file.write(json.dumps({"step": step, "metrics": self.numbers(metrics)}) + "\n")

    def numbers(self, metrics):
        return dict(metrics)

    def finish(self, status):
        if self.file is not None:
            self.file.close()
            self.file = None


class Kit(LoggerContract):
    def read_back(self, logger, run_dir):
        lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()[1:]]
        return {line["step"]: line["metrics"] for line in lines}


class NoStart(Lines):
    start = None


class StepByPlace(Lines):
    def log(self, step, metrics):
        super().log(metrics, step=step)


class Async(Lines):
    async def finish(self, status):
        super().finish(status)


class RaisesWhenInterrupted(Lines):
    def finish(self, status):
        super().finish({"completed": 0, "failed": 1}[status])


class FinishesOnce(Lines):
    def finish(self, status):
        self.file.write(status)
        self.file.close()


class NeedsAStart(Lines):
    def finish(self, status):
        self.file.write(status)
        super().finish(status)


class PlainJson(Lines):
    def plain(self, config):
        return config


class SplitsNames(Lines):
    def numbers(self, metrics):
        return {"/".join(name.split("/", 1)[1:]) or name[9]: value for name, value in metrics.items()}


class SinglePrecision(Lines):
    def numbers(self, metrics):
        import struct

        return {name: struct.unpack(">f", struct.pack(">f", value))[0] for name, value in metrics.items()}


class NeedsAMetric(Lines):
    def numbers(self, metrics):
        return {min(metrics): metrics[min(metrics)], **metrics}


class StepsOnlyRise(Lines):
    last = -1

    def log(self, metrics, *, step):
        if step <= self.last:
            raise ValueError("step went back")
        self.last = step
        super().log(metrics, step=step)


class DropsTheFirst(Lines):
    def log(self, metrics, *, step):
        if step > 1:
            super().log(metrics, step=step)


class Rounds(Lines):
    def numbers(self, metrics):
        return {name: round(value, 2) for name, value in metrics.items()}


class RenamesSlashes(Lines):
    def numbers(self, metrics):
        return {name.replace("/", "."): value for name, value in metrics.items()}


class EditsTheMetrics(Lines):
    def log(self, metrics, *, step):
        metrics["step"] = step
        super().log(metrics, step=step)


class EditsTheConfig(Lines):
    def start(self, run_name, run_dir, config):
        super().start(run_name, run_dir, config)
        config["policy"]["model_name"] = run_name


class RaisesOSError(Lines):
    def open(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "log.jsonl").open("w")


class CannotFinishAfterThat(Lines):
    broken = False

    def open(self, folder):
        try:
            super().open(folder)
        except CheckpointError:
            self.broken = True
            raise

    def finish(self, status):
        assert not self.broken
        super().finish(status)


BROKEN = {
    "takes_the_calls_of_a_run": [NoStart, StepByPlace, Async],
    "whole_run": [RaisesWhenInterrupted],
    "finish_twice": [FinishesOnce],
    "finish_before_start": [NeedsAStart],
    "any_config": [PlainJson],
    "odd_metrics": [SplitsNames, SinglePrecision],
    "step_without_metrics": [NeedsAMetric],
    "steps_again": [StepsOnlyRise],
    "numbers_round_trip": [DropsTheFirst, Rounds, RenamesSlashes],
    "inputs_are_left_alone": [EditsTheMetrics, EditsTheConfig],
    "folder_it_cannot_write": [RaisesOSError, CannotFinishAfterThat],
}


def test_a_sound_logger_passes_every_clause():
    report = run_kit(Kit, Lines)
    assert [result for result in report.results if result.outcome != "passed"] == []


def test_every_clause_has_a_broken_logger():
    assert set(BROKEN) == set(clauses(LoggerContract))


@pytest.mark.parametrize(("clause", "broken"), [(c, b) for c, many in BROKEN.items() for b in many])
def test_a_broken_logger_fails_its_clause(clause, broken):
    report = run_kit(Kit, broken, only=[clause])
    assert report.failed == (clause,), report
