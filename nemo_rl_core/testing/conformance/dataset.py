"""The contract of a dataset source.

What a run needs of its rows: the same ones in the same order every time, also after a restart in the middle, and
an error that leads to the broken line.
"""

from __future__ import annotations

import itertools
import json
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol, TypeGuard

import attrs
import pytest

from nemo_rl_core.data.module import DataModule, TaskItem
from nemo_rl_core.errors import DataError
from nemo_rl_core.protocols.dataset import DatasetSource, Rows
from nemo_rl_core.registry import ComponentRef
from nemo_rl_core.schema import DataConfig, DatasetConfig
from nemo_rl_core.testing.conformance.frame.declared import overlaid
from nemo_rl_core.testing.conformance.frame.kit import Contract
from nemo_rl_core.testing.conformance.frame.process_traces import changes_made_by

__all__ = ["BrokenSource", "DatasetContract"]

LoadedRows = Rows | Iterable[object]
"""Rows addressable by index, or a stream of them."""


class _Loadable(Protocol):
    def load(self) -> LoadedRows: ...


class _StatefulRows(Protocol):
    def __iter__(self) -> Iterator[object]: ...

    def state_dict(self) -> object: ...

    def load_state_dict(self, state: Any, /) -> object: ...


@attrs.frozen(kw_only=True)
class BrokenSource:
    """A source that cannot be read, and the texts that its error must contain."""

    source: _Loadable
    """As the fixture gives: has `load`."""
    names: Sequence[str]
    """Texts that the error holds: the file, and the line where there are lines."""


class DatasetContract(Contract):
    """What every dataset source must be. Define the fixture `dataset`.

    The source must have 8 rows at least.

    Attributes:
        max_rows: Rows that are read of a large one.
        accepted: Names that `accepts` takes.
        refused: Names that it does not.
    """

    kind: ClassVar[str] = "datasets"
    subject: ClassVar[str] = "dataset"
    max_rows: ClassVar[int] = 40
    accepted: ClassVar[Sequence[str]] = ()
    refused: ClassVar[Sequence[str]] = ("", "neither a file\nnor a name", "\0")

    @classmethod
    def from_component(cls, ref: ComponentRef, options: Mapping[str, Any], example: Mapping[str, Any]) -> object:
        """Return the source made with its options; a function gets them as arguments when it loads."""
        component = ref.load()
        if isinstance(component, type):
            return super().from_component(ref, options, example)
        return _FunctionSource(component, overlaid(example, options))

    @classmethod
    def declared_by(cls, subject: object) -> object:
        """Return the source, or the function that serves as one."""
        return subject.function if isinstance(subject, _FunctionSource) else subject

    @classmethod
    def mistake_in(cls, subject: object) -> str | None:
        """Refuse a class, and rows in place of a source, which has a method `load`."""
        if isinstance(subject, type):
            return f"it returns the class {subject.__name__}: return a source, such as {subject.__name__}(...)"
        if not callable(getattr(subject, "load", None)):
            return f"it returns a {type(subject).__name__} without a method `load`: return the source, not its rows"
        return None

    def broken(self, folder: Path) -> Mapping[str, BrokenSource]:
        """Return broken sources by what is wrong with them, such as a truncated file. Default: none.

        Args:
            folder: Empty; write the files here.
        """
        return {}

    # -- clauses -------------------------------------------------------------------------------

    def test_gives_rows(self, dataset: DatasetSource) -> None:
        """`load` gives rows: at least one, addressable by index or in a stream."""
        rows = dataset.load()
        plain = not isinstance(rows, str | bytes | Mapping)
        assert plain and (hasattr(rows, "__iter__") or hasattr(rows, "__getitem__")), (
            f"load returned a {type(rows).__name__}, which is no rows"
        )
        assert self._rows(dataset), "load returned no row at all"

    def test_rows_are_mappings(self, dataset: DatasetSource) -> None:
        """Each row is a mapping of column names, which are text, to values."""
        for number, row in enumerate(self._rows(dataset)):
            assert isinstance(row, Mapping), f"row {number} is a {type(row).__name__}, not a mapping"
            wrong = [name for name in row if not isinstance(name, str)]
            assert not wrong, f"row {number} has a column named {wrong[0]!r}, which is no text"

    def test_index_and_length_agree(self, dataset: DatasetSource) -> None:
        """Rows by index: `len` says how many, each can be read, one too far is an IndexError."""
        rows = dataset.load()
        if not _is_table(rows):
            pytest.skip("it is a stream")
        size = len(rows)
        for index in {0, size // 2, size - 1}:
            try:
                rows[index]
            except Exception as error:
                raise AssertionError(f"row {index} of {size} raised {type(error).__name__}: {error}") from error
        try:
            rows[size]
        except IndexError:
            return
        except Exception as error:
            raise AssertionError(f"row {size} of {size} raised {type(error).__name__}, not IndexError") from error
        raise AssertionError(f"it says it has {size} rows, and there is a row {size}")

    def test_same_rows_every_time(self, dataset: DatasetSource) -> None:
        """Loaded again it gives the same rows in the same order, and all of them."""
        first, second = self._rows(dataset), self._rows(dataset)
        assert len(second) == len(first), f"first it gave {len(first)} rows, then {len(second)}"
        different = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if not _equal(a, b)]
        assert not different, f"row {different[0]} was {first[different[0]]!r:.80}, then {second[different[0]]!r:.80}"

    def test_row_depends_on_its_index_alone(self, dataset: DatasetSource) -> None:
        """A row read out of order, or twice, is the row that it is in order."""
        rows = dataset.load()
        if not _is_table(rows):
            pytest.skip("it is a stream")
        in_order = self._rows(dataset)
        count = len(in_order)
        for index in [*range(count - 1, -1, -1), 0, 0, count // 2]:
            assert _equal(rows[index], in_order[index]), (
                f"read out of order row {index} is {rows[index]!r:.80}, in order {in_order[index]!r:.80}"
            )

    def test_resume(self, dataset: DatasetSource) -> None:
        """A run that is resumed in the middle of the data, or of its second pass, neither repeats nor skips a row."""
        size = len(self._rows(dataset))
        assert size >= 8, f"this clause needs 8 rows, the source has {size}"
        for shuffle in (False, True):
            straight = self._module(dataset, size, shuffle=shuffle)
            expected = [_text(item) for item in straight.next(size + size // 2) or ()]
            for done in (1, size // 2, size + 2):
                before = self._module(dataset, size, shuffle=shuffle)
                delivered = [_text(item) for item in before.next(done) or ()]
                state = json.loads(json.dumps(before.state_dict()))
                after = self._module(dataset, size, shuffle=shuffle)
                after.load_state_dict(state)
                delivered += [_text(item) for item in after.next(size + size // 2 - done) or ()]
                wrong = [i for i, (a, b) in enumerate(zip(delivered, expected, strict=True)) if a != b]
                assert not wrong, (
                    f"resumed after {done} of {size} rows (shuffle {shuffle}) it gave {delivered[wrong[0]]:.80} where "
                    f"an uninterrupted run has {expected[wrong[0]]:.80}"
                )

    def test_every_row_once_an_epoch(self, dataset: DatasetSource) -> None:
        """One pass of a run delivers every row exactly once, shuffled or not."""
        rows = sorted(_as_text(row) for row in self._rows(dataset))
        if len(rows) == self.max_rows and not _is_table(dataset.load()):
            pytest.skip(f"it is a stream of {self.max_rows} rows or more, which is not read to its end")
        for shuffle in (False, True):
            module = self._module(dataset, len(rows), shuffle=shuffle)
            delivered = sorted(_text(item) for item in module.next(len(rows)) or ())
            assert delivered == rows, f"with shuffle {shuffle} a pass does not hold every row once"

    def test_errors_name_the_place(self, dataset: DatasetSource, tmp_path: Path) -> None:
        """What cannot be read is a `DataError` that names the file, and the line where there is one."""
        broken = self.broken(tmp_path)
        if not broken:
            pytest.skip("`broken` gives no source")
        for what, case in broken.items():
            try:
                for _ in _read(case.source.load(), None):
                    pass
            except DataError as error:
                missing = [name for name in case.names if name not in str(error)]
                assert not missing, f"the error for {what} does not name {', '.join(map(repr, missing))}: {error}"
            except Exception as error:
                raise AssertionError(f"{what} raised {type(error).__name__} ({error}), not DataError") from error
            else:
                raise AssertionError(f"{what} raised nothing: its rows were read")

    def test_accepts_without_network(self, dataset: DatasetSource, monkeypatch: pytest.MonkeyPatch) -> None:
        """`accepts` says yes or no to any text at once, and does not touch the network."""
        accepts = getattr(dataset, "accepts", None)
        if accepts is None:
            pytest.skip("it has no `accepts`")
        reached: list[str] = []

        def refuse(*arguments: object, **_: object) -> NoReturn:
            reached.append(repr(arguments[-1] if arguments else "")[:60])
            raise OSError("no network in this clause")

        for name in ("connect", "connect_ex", "sendto"):
            monkeypatch.setattr(socket.socket, name, refuse)
        for name in ("getaddrinfo", "gethostbyname", "create_connection"):
            monkeypatch.setattr(socket, name, refuse)
        for text in (*self.accepted, *self.refused, "owner/name", "data.unknown", "x" * 300):
            try:
                answer = accepts(text)
            except Exception as error:
                assert not reached, f"accepts({text!r:.40}) went to the network"
                raise AssertionError(f"accepts({text!r:.40}) raised {type(error).__name__}: {error}") from error
            assert not reached, f"accepts({text!r:.40}) went to the network: {reached[0]}"
            assert isinstance(answer, bool), f"accepts({text!r:.40}) returned {answer!r:.40}, not True or False"
            assert answer or text not in self.accepted, f"it does not accept {text!r}"
            assert not answer or text not in self.refused, f"it accepts {text!r:.40}"

    def test_process_stays_as_it_is(self, dataset: DatasetSource) -> None:
        """It changes nothing of the process (variables, folder, global random numbers, logging) and prints nothing."""
        found = changes_made_by(lambda: self._rows(dataset))
        assert not found, f"after a call {'; '.join(found[:3])}: everything else in the process sees that"

    def test_declares_its_options(self, dataset: DatasetSource) -> None:
        """Its options are an attrs class, `config_class`, so that a configuration is checked when it is loaded."""
        if isinstance(dataset, _FunctionSource):
            pytest.skip("it is a function: its arguments are its options")
        found = getattr(dataset, "config_class", None)
        assert isinstance(found, type) and attrs.has(found), f"config_class is {found!r}, not an attrs class"

    def test_pickles(self, dataset: DatasetSource) -> None:
        """It can be sent to a worker process and gives the same rows there; so can rows by index."""
        import cloudpickle

        expected = self._rows(dataset)
        loaded = dataset.load()
        copies = {"the source": dataset, **({"the rows": loaded} if _is_table(loaded) else {})}
        for what, original in copies.items():
            try:
                copy = pickle.loads(cloudpickle.dumps(original))
            except Exception as error:
                raise AssertionError(f"{what} cannot be pickled: {type(error).__name__}: {error}") from error
            found = self._rows(copy) if what == "the source" else list(_read(copy, self.max_rows))
            same = len(found) == len(expected) and all(map(_equal, found, expected))
            assert same, f"a copy of {what} gives other rows"

    # -- reading -------------------------------------------------------------------------------

    def _rows(self, dataset: DatasetSource) -> list[object]:
        """Load the source anew and return its first rows."""
        return list(_read(dataset.load(), self.max_rows))

    def _module(self, dataset: DatasetSource, size: int, *, shuffle: bool) -> DataModule:
        """Return the data of a run on the first `size` rows, each row's text as its prompt."""
        source = _AsPrompts(dataset)
        whole = size < self.max_rows or isinstance(source.load(), _StatefulStream)  # a limit would hide its state
        config = DataConfig(train=DatasetConfig(source=source, limit=None if whole else size), shuffle=shuffle)
        return DataModule(config, seed=3, stream_buffer=5)


@attrs.frozen
class _FunctionSource:
    """A function that returns rows, as a source."""

    function: Callable[..., LoadedRows]
    options: dict[str, Any]

    def load(self) -> LoadedRows:
        """Return the rows that the function returns."""
        return self.function(**self.options)


@attrs.frozen
class _AsPrompts:
    """A source whose rows have one column `prompt`, the text of the original row."""

    source: DatasetSource

    def load(self) -> LoadedRows:
        """Load rows of the same kind: by index, or a stream with or without a state."""
        rows = self.source.load()
        if _is_table(rows):
            return _Table(rows)
        return _StatefulStream(rows) if _has_state(rows) else _Stream(rows)


@attrs.frozen
class _Table:
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"prompt": _as_text(self.rows[index])}


@attrs.frozen
class _Stream:
    rows: Iterable[object]

    def __iter__(self) -> Iterator[dict[str, str]]:
        return ({"prompt": _as_text(row)} for row in self.rows)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


class _StatefulStream(_Stream):
    rows: _StatefulRows

    def state_dict(self) -> object:
        return self.rows.state_dict()

    def load_state_dict(self, state: object) -> None:
        self.rows.load_state_dict(state)


def _is_table(rows: object) -> TypeGuard[Rows]:
    return hasattr(rows, "__len__") and hasattr(rows, "__getitem__")


def _has_state(rows: object) -> TypeGuard[_StatefulRows]:
    return hasattr(rows, "load_state_dict")


def _read(rows: LoadedRows, limit: int | None) -> Iterator[object]:
    """Yield the rows as a run reads them, at most `limit` of them."""
    if _is_table(rows):
        size = len(rows)
        return (rows[i] for i in range(size if limit is None else min(size, limit)))
    return itertools.islice(iter(rows), limit)


def _as_text(row: object) -> str:
    return json.dumps(row, sort_keys=True, default=repr)


def _text(item: TaskItem) -> str:
    return str(item.task["prompt"])


def _equal(first: object, second: object) -> bool:
    return _as_text(first) == _as_text(second)
