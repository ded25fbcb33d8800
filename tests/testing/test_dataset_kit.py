"""The contract of a dataset source against sources broken on purpose, one at least for each clause."""

from __future__ import annotations

import json
import random
import socket
import threading
from functools import partial
from pathlib import Path

import pytest
from attrs import frozen

from nemo_rl_core.errors import DataError
from nemo_rl_core.testing import BrokenSource, DatasetContract, run_kit
from nemo_rl_core.testing.conformance.frame.kit import clauses

ROWS = [{"prompt": f"{i} + {i}?", "answer": str(2 * i)} for i in range(12)]


@frozen(kw_only=True)
class Options:
    path: str = ""


class Lines:
    """A source of JSON lines; without a file it has its own rows."""

    config_class = Options

    def __init__(self, config):
        self.config = config

    @classmethod
    def accepts(cls, source):
        return source.endswith(".lines")

    def load(self):
        return self.rows()

    def rows(self):
        if not self.config.path:
            return [dict(row) for row in ROWS]
        lines = Path(self.config.path).read_text().splitlines()
        return [self.parsed(number, line) for number, line in enumerate(lines, 1)]

    def parsed(self, number, line):
        try:
            return json.loads(line)
        except ValueError as error:
            raise DataError(f"{self.config.path}:{number}: {error}") from error


class Kit(DatasetContract):
    accepted = ("a.lines",)
    source_class = Lines

    def broken(self, folder):
        path = folder / "cut.lines"
        path.write_text('{"prompt": "1"}\n{"prompt": "2"}\n{"prom')
        source = self.source_class(Options(path=str(path)))
        return {"a file that was cut short": BrokenSource(source=source, names=["cut.lines", ":3"])}


# -- broken rows by index --------------------------------------------------------------------------------


class Splits(Lines):
    def rows(self):
        return {"train": super().rows()}


class Empty(Lines):
    def rows(self):
        return iter(())


class Tuples(Lines):
    def rows(self):
        return [tuple(row.values()) for row in super().rows()]


class NumberedColumns(Lines):
    def rows(self):
        return [dict(enumerate(row.values())) for row in super().rows()]


class NoEnd(list):
    """An index too far begins again."""

    def __getitem__(self, index):
        return super().__getitem__(index % len(self))


class BeginsAgain(Lines):
    def rows(self):
        return NoEnd(super().rows())


class CountsTooMany(Lines):
    def rows(self):
        class Rows(list):
            def __len__(self):
                return super().__len__() + 1

        return Rows(super().rows())


class AnyOrder(Lines):
    def rows(self):
        rows = super().rows()
        random.shuffle(rows)
        return rows


class ReadOnce(Lines):
    stream = None

    def rows(self):
        self.stream = self.stream or iter(super().rows())
        return self.stream


class AugmentedByCall(Lines):
    """What a row is depends on how many were read before."""

    def rows(self):
        class Rows(list):
            calls = 0

            def __getitem__(self, index):
                self.calls += 1
                return {**super().__getitem__(index), "variant": self.calls}

        return Rows(super().rows())


# -- broken streams ----------------------------------------------------------------------------------------


class Stream:
    """Rows in order, with a state."""

    skew = 0

    def __init__(self, rows):
        self.all = rows
        self.at = 0

    def __iter__(self):
        while self.at < len(self.all):
            self.at += 1
            yield self.all[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at + self.skew}

    def load_state_dict(self, state):
        self.at = state["at"]


class Stateful(Lines):
    stream_class = Stream

    def rows(self):
        return self.stream_class(super().rows())


class SkipsOnResume(Stateful):
    class stream_class(Stream):
        skew = 1


class RepeatsOnResume(Stateful):
    class stream_class(Stream):
        skew = -1


class ForgetsItsState(Stateful):
    class stream_class(Stream):
        def load_state_dict(self, state):
            self.at = 0


class DropsOneAnEpoch(Lines):
    """Another row is left out each time the stream is read."""

    class rows_class:
        reads = 0

        def __init__(self, rows):
            self.all = rows

        def __iter__(self):
            type(self).reads += 1
            return iter(self.all) if type(self).reads % 2 else iter(self.all[:-1])

    def rows(self):
        return self.rows_class(super().rows())


class RunsShort(Lines):
    """A pass with a run's loader, which asks for every length first, leaves rows out."""

    def rows(self):
        class Rows(list):
            asked = 0

            def __len__(self):
                self.asked += 1
                return super().__len__() - (self.asked > 2)

        return Rows(super().rows())


# -- broken in other ways --------------------------------------------------------------------------------


class PassesOverWhatItCannotRead(Lines):
    def parsed(self, number, line):
        try:
            return super().parsed(number, line)
        except DataError:
            return {}


class RaisesWhatJsonRaises(Lines):
    def parsed(self, number, line):
        return json.loads(line)


class NamesNoLine(Lines):
    def parsed(self, number, line):
        try:
            return json.loads(line)
        except ValueError as error:
            raise DataError(f"{self.config.path} is broken: {error}") from error


class AsksTheHub(Lines):
    @classmethod
    def accepts(cls, source):
        try:
            socket.create_connection(("192.0.2.1", 9), timeout=0.01).close()
        except OSError:
            return source.endswith(".lines")
        return True


class AcceptsEverything(Lines):
    @classmethod
    def accepts(cls, source):
        return True


class RaisesOnOddNames(Lines):
    @classmethod
    def accepts(cls, source):
        return Path(source).name.split(".")[1] == "lines"


class TakesAnything(Lines):
    config_class = dict


class HoldsALock(Lines):
    def __init__(self, config):
        super().__init__(config)
        self.lock = threading.Lock()


class RowsHoldALock(Lines):
    def rows(self):
        class Rows(list):
            lock = None

        rows = Rows(super().rows())
        rows.lock = threading.Lock()
        return rows


class ShufflesWithGlobalNumbers(Lines):
    def rows(self):
        random.seed(0)
        rows = super().rows()
        random.shuffle(rows)
        return rows


BROKEN = {
    "gives_rows": [Splits, Empty],
    "rows_are_mappings": [Tuples, NumberedColumns],
    "index_and_length_agree": [BeginsAgain, CountsTooMany],
    "same_rows_every_time": [AnyOrder, ReadOnce],
    "row_depends_on_its_index_alone": [AugmentedByCall],
    "resume": [SkipsOnResume, RepeatsOnResume, ForgetsItsState],
    "every_row_once_an_epoch": [DropsOneAnEpoch, RunsShort],
    "errors_name_the_place": [PassesOverWhatItCannotRead, RaisesWhatJsonRaises, NamesNoLine],
    "accepts_without_network": [AsksTheHub, AcceptsEverything, RaisesOnOddNames],
    "declares_its_options": [TakesAnything],
    "process_stays_as_it_is": [ShufflesWithGlobalNumbers],
    "pickles": [HoldsALock, RowsHoldALock],
}


def of(source_class):
    """A kit whose broken files are read by this class."""
    return type("Kit", (Kit,), {"source_class": source_class})


@pytest.mark.parametrize("source_class", [Lines, Stateful])
def test_a_sound_source_passes_every_clause(source_class):
    report = run_kit(of(source_class), partial(source_class, Options()))
    streams_lack = ("index_and_length_agree", "row_depends_on_its_index_alone") if source_class is Stateful else ()
    assert report.failed == ()
    assert tuple(result.clause for result in report.results if result.outcome == "skipped") == streams_lack


def test_every_clause_has_a_broken_source():
    assert set(BROKEN) == set(clauses(DatasetContract))


@pytest.mark.parametrize(("clause", "broken"), [(c, b) for c, many in BROKEN.items() for b in many])
def test_a_broken_source_fails_its_clause(clause, broken):
    report = run_kit(of(broken), partial(broken, Options()), only=[clause])
    assert report.failed == (clause,), report


def test_a_few_rows_are_too_few_to_resume():
    class Few(Lines):
        def rows(self):
            return super().rows()[:3]

    (result,) = run_kit(Kit, partial(Few, Options()), only=["resume"]).results
    assert "needs 8 rows, the source has 3" in result.message
