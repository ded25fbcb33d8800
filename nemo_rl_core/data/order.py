"""Order of rows: epoch after epoch, restorable at any row."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from attrs import frozen

from nemo_rl_core.data.prompts import RowFormat
from nemo_rl_core.data.sources import LoadedRows, RowStream, TableRows
from nemo_rl_core.errors import DataError

__all__ = ["FormattedRows", "StreamOrder", "TableOrder", "TaskItem"]

_MAX_ROWS_CHECKED_FOR_IDS = 20_000

_NumberedRows = Iterator[tuple[int, Mapping[str, Any]]]


@frozen(kw_only=True)
class TaskItem:
    """One row of the run's data, at its place in the run's order."""

    index: int
    """Running number over the run, from 0: the order in which groups are trained."""
    epoch: int
    """Number of the epoch, from 0."""
    row_index: int
    """Position of the row in its source (in its stream, counted from the start of the epoch)."""
    task_id: str
    """The row's `id` or `task_id` if these are unique in the data, else `row_index`; equal in every epoch."""
    task: dict[str, Any]
    """The row as `RowFormat` formats it."""


class FormattedRows(torch.utils.data.Dataset[TaskItem]):
    """Rows with their format, indexed by (index, epoch, row_index) by the loader.

    Raises:
        DataError: The first row cannot be read or formatted: told before anything is started.
    """

    def __init__(self, rows: LoadedRows, row_format: RowFormat, feed: Literal["rollouts", "examples"]) -> None:
        self.rows = rows
        self.name = rows.name
        self._format = row_format.task if feed == "rollouts" else row_format.example
        self._id_column: str | None = None
        self._fingerprint: dict[str, Any] | None = None
        if isinstance(rows, TableRows):
            first = rows[0]
            self._format(first, where="row 0")
            self._id_column = _unique_id_column(rows, first)

    @property
    def size(self) -> int | None:
        """Number of rows; None for a stream."""
        return len(self.rows) if isinstance(self.rows, TableRows) else None

    def __getitem__(self, key: tuple[int, int, int]) -> TaskItem:
        assert isinstance(self.rows, TableRows)
        index, epoch, row_index = key
        return self.item(index=index, epoch=epoch, row_index=row_index, row=self.rows[row_index])

    def item(self, *, index: int, epoch: int, row_index: int, row: Mapping[str, Any]) -> TaskItem:
        """The formatted row at its place in the run."""
        task = self._format(row, where=f"row {row_index}")
        task_id = str(row_index if self._id_column is None else row[self._id_column])
        return TaskItem(index=index, epoch=epoch, row_index=row_index, task_id=task_id, task=task)

    def fingerprint(self) -> dict[str, Any]:
        """Number of rows and a hash of some of them; nothing for a stream."""
        if self._fingerprint is None:
            self._fingerprint = _fingerprint(self.rows) if isinstance(self.rows, TableRows) else {}
        return self._fingerprint


class TableOrder(torch.utils.data.Sampler[tuple[int, int, int]]):
    """Every row once per epoch, without end, in an order made from (seed, epoch)."""

    def __init__(self, size: int, seed: int, *, shuffle: bool) -> None:
        self.size = size
        self.seed = seed
        self.shuffle = shuffle

    def __iter__(self) -> _TableIterator:
        return _TableIterator(self)

    def of_epoch(self, epoch: int) -> Sequence[int]:
        """Row indices in the order of one epoch."""
        if not self.shuffle:
            return range(self.size)
        generator = torch.Generator().manual_seed(_seed_of(self.seed, epoch))
        order: list[int] = torch.randperm(self.size, generator=generator).tolist()
        return order


class _TableIterator:
    def __init__(self, order: TableOrder) -> None:
        self._order = order
        self._index = 0
        self._epoch = -1
        self._rows: Sequence[int] = ()

    def __iter__(self) -> _TableIterator:
        return self

    def __next__(self) -> tuple[int, int, int]:
        epoch, position = divmod(self._index, self._order.size)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self._order.of_epoch(epoch)
        key = (self._index, epoch, self._rows[position])
        self._index += 1
        return key

    def state_dict(self) -> dict[str, Any]:
        return {"index": self._index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._index = int(state["index"])


class StreamOrder(torch.utils.data.IterableDataset[TaskItem]):
    """A stream epoch after epoch, shuffled through a buffer if asked."""

    def __init__(self, rows: FormattedRows, seed: int, buffer_size: int, max_epochs: int | None) -> None:
        self.rows = rows
        self.seed = seed
        self.buffer_size = buffer_size
        self.max_epochs = max_epochs

    def __iter__(self) -> _StreamIterator:
        return _StreamIterator(self)


class _StreamIterator:
    """Position in a stream. Restored from the source's own state if it has one, else by reading again."""

    def __init__(self, order: StreamOrder) -> None:
        assert isinstance(order.rows.rows, RowStream)
        self._order = order
        self._stream = order.rows.rows
        self._index = 0
        self._epoch = 0
        self._position = 0
        self._current: _NumberedRows | None = None
        self._source: Any = None

    def __iter__(self) -> _StreamIterator:
        return self

    def __next__(self) -> TaskItem:
        rows = self._current or self._open()
        while (numbered := next(rows, None)) is None:
            rows = self._next_epoch()
        row_index, row = numbered
        item = self._order.rows.item(index=self._index, epoch=self._epoch, row_index=row_index, row=row)
        self._index += 1
        self._position += 1
        return item

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"index": self._index, "epoch": self._epoch, "position": self._position}
        if self._resumable() and self._current is not None:
            state["source"] = self._source.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._index, self._epoch, self._position = int(state["index"]), int(state["epoch"]), int(state["position"])
        self._open(state.get("source"))

    def _next_epoch(self) -> _NumberedRows:
        if self._position == 0:
            raise DataError(f"{self._stream.name} is empty: there is nothing to train on.")
        last = self._order.max_epochs
        if last is not None and self._epoch + 1 >= last:
            raise StopIteration
        self._epoch, self._position = self._epoch + 1, 0
        return self._open()

    def _resumable(self) -> bool:
        has_state = hasattr(self._source, "state_dict") and hasattr(self._source, "load_state_dict")
        return self._order.buffer_size == 0 and has_state

    def _open(self, source_state: object = None) -> _NumberedRows:
        """Start this epoch's iteration at `self._position`."""
        rows, self._source = self._stream.start(self._epoch)
        if source_state is not None and self._resumable():
            self._source.load_state_dict(source_state)
            self._current = zip(itertools.count(self._position), rows, strict=False)
            return self._current
        self._current = enumerate(rows)
        if self._order.buffer_size:
            draw = random.Random(_seed_of(self._order.seed, self._epoch))
            self._current = _through_buffer(self._current, self._order.buffer_size, draw)
        skipped = sum(1 for _ in islice(self._current, self._position))
        if skipped < self._position:
            raise DataError(
                f"{self._stream.name} has {skipped} rows, but the saved run had read {self._position} in epoch "
                f"{self._epoch}. Restore the data, or start a new run."
            )
        return self._current


def _through_buffer(rows: Iterator[Any], size: int, draw: random.Random) -> Iterator[Any]:
    """Yield rows in random order, holding at most `size`."""
    buffer: list[Any] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        chosen = draw.randrange(size)
        yield buffer[chosen]
        buffer[chosen] = row
    draw.shuffle(buffer)
    yield from buffer


def _seed_of(seed: int, epoch: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"order/{seed}/{epoch}".encode(), digest_size=8).digest(), "big") >> 1


def _fingerprint(rows: TableRows) -> dict[str, Any]:
    size = len(rows)
    chosen = sorted({0, size - 1, *(size * i // 8 for i in range(8))})
    # Values that JSON lacks (images, dates) count by their type: their repr may hold a memory address.
    text = json.dumps([dict(rows[i]) for i in chosen], sort_keys=True, default=lambda value: type(value).__name__)
    return {"num_rows": size, "content": hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}


def _unique_id_column(rows: TableRows, first: Mapping[str, Any]) -> str | None:
    """The column whose values tell the rows apart, if it is cheap to know."""
    column = next((name for name in ("task_id", "id") if first.get(name) is not None), None)
    if column is None or len(rows) > _MAX_ROWS_CHECKED_FOR_IDS:
        return None
    ids = {str(rows[i].get(column)) for i in range(len(rows))}
    return column if len(ids) == len(rows) else None
