"""Rows from files: JSONL, CSV, Parquet. Nothing heavy is imported before a Parquet file is opened."""

from __future__ import annotations

import bisect
import csv
import glob
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from attrs import field, frozen, validators

from nemo_rl_core.errors import DataError
from nemo_rl_plugins_datasets.examples import Example, csv_file, jsonl_file, parquet_file
from nemo_rl_plugins_datasets.lines import IndexedLines

__all__ = ["CsvOptions", "CsvSource", "FileOptions", "JsonlSource", "ParquetSource"]


@frozen(kw_only=True)
class FileOptions:
    """Options of a source that reads files."""

    path: str = field(validator=validators.min_len(1))
    """A file, or a glob such as `data/part-*.jsonl`: the files are read one after another in order of name."""


@frozen(kw_only=True)
class CsvOptions(FileOptions):
    """Options of a CSV source."""

    delimiter: str | None = field(default=None, validator=validators.optional(validators.max_len(1)))
    """None is a tab for `.tsv` files, else a comma."""


class _FileSource:
    """What the file sources share: options, suffixes, finding the files."""

    config_class: ClassVar[type] = FileOptions
    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, config: FileOptions) -> None:
        self.config: Any = config

    @classmethod
    def accepts(cls, source: str) -> bool:
        """Whether the name of a file (or glob) ends as this source's files do."""
        return source.lower().endswith(cls.suffixes) and not os.path.isdir(source)

    def _files(self) -> list[str]:
        path = os.path.expanduser(self.config.path)
        if os.path.isdir(path):
            names = sorted(str(p) for p in Path(path).iterdir() if str(p).lower().endswith(self.suffixes))
            where = f"folder {path!r} holds no file ending in {' or '.join(self.suffixes)}"
        else:
            names = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
            where = f"{path!r} does not exist (looked in {os.getcwd()})"
        if not names:
            raise DataError(f"Dataset {where}. Correct `path`.")
        return names


class JsonlSource(_FileSource):
    """One JSON object per line, as `.jsonl` or gzipped as `.jsonl.gz`; also a `.json` file that holds a list of them.

    Only the offsets of the lines are held in memory; a row is read when it is asked for. A gzipped file is
    unpacked into memory, still without parsing it.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json")
    example: ClassVar[Example] = staticmethod(jsonl_file)

    def load(self) -> Sequence[Mapping[str, Any]]:
        """The rows. The first and the last line are parsed at once, so that a truncated file is told now.

        Raises:
            DataError: A file cannot be read, or a line is not a JSON object; names file and line.
        """
        return _Joined([_json_list(path) or _JsonlRows(IndexedLines(path)) for path in self._files()])


class CsvSource(_FileSource):
    """A header and one row per line, as `.csv` or `.tsv` (also `.gz`); values are strings."""

    config_class: ClassVar[type] = CsvOptions
    suffixes: ClassVar[tuple[str, ...]] = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
    example: ClassVar[Example] = staticmethod(csv_file)

    def load(self) -> Sequence[Mapping[str, Any]]:
        """The rows, held in memory.

        Raises:
            DataError: A file cannot be read, has no header, or a row has more or fewer values than it.
        """
        return [row for path in self._files() for row in self._rows(path)]

    def _rows(self, path: str) -> list[dict[str, str]]:
        delimiter = self.config.delimiter or ("\t" if ".tsv" in path.lower() else ",")
        opened: Any = gzip.open if path.endswith(".gz") else open
        csv.field_size_limit(1 << 30)  # worked solutions are longer than the 128 KiB that csv allows at first
        line = 0
        try:
            with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, delimiter=delimiter, strict=True)
                header = next(reader, None)
                if not header:
                    raise DataError(f"{path} has no header line. Its first line must name the columns.")
                rows = []
                for values in reader:
                    line = reader.line_num
                    if values:
                        rows.append(_csv_row(header, values, f"{path}:{line}"))
        except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as e:
            raise DataError(
                f"{path} cannot be read as CSV after line {line}: {e}. The file may be truncated or damaged."
            ) from e
        return rows


def _csv_row(header: list[str], values: list[str], where: str) -> dict[str, str]:
    if len(values) != len(header):
        raise DataError(
            f"{where} has {len(values)} values, but the header names {len(header)} columns ({', '.join(header)}). "
            "Quote values that hold the delimiter, or repair the line."
        )
    return dict(zip(header, values, strict=True))


class ParquetSource(_FileSource):
    """Apache Parquet files, mapped into memory rather than read."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)
    example: ClassVar[Example] = staticmethod(parquet_file)

    def load(self) -> Sequence[Mapping[str, Any]]:
        """The rows.

        Raises:
            DataError: A file is truncated or is not Parquet.
        """
        return _Joined([_ParquetRows(path) for path in self._files()])


def _json_list(path: str) -> list[dict[str, Any]] | None:
    """The rows of a `.json` file that holds a list; None if it holds something else (lines, perhaps)."""
    if not path.lower().endswith(".json"):
        return None
    text = Path(path).read_bytes().lstrip()
    if not text.startswith(b"["):
        return None
    try:
        rows = json.loads(text)
    except ValueError as e:
        raise DataError(f"{path} is not valid JSON: {e}. The file may be truncated.") from e
    wrong = next((i for i, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise DataError(f"Item {wrong} of the list in {path} is not an object of columns: {rows[wrong]!r:.80}.")
    return rows  # type: ignore[no-any-return]


class _JsonlRows(Sequence[Mapping[str, Any]]):
    def __init__(self, lines: IndexedLines) -> None:
        self._lines = lines
        if len(lines):
            self[0], self[len(lines) - 1]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        number, text = self._lines[index]
        where = f"{self._lines.path}:{number}"
        try:
            row = json.loads(text)
        except ValueError as e:  # also bytes that are not UTF-8
            last = " It is the last line: the file may be truncated." if index == len(self) - 1 else ""
            raise DataError(
                f"{where} is not valid JSON: {e}. Found: {text[:80]!r}.{last} Each line must hold one JSON object."
            ) from e
        if not isinstance(row, dict):
            raise DataError(f"{where} holds a {type(row).__name__}. Each line must hold one JSON object of columns.")
        return row


class _ParquetRows(Sequence[Mapping[str, Any]]):
    """Reads one row group at a time and keeps the last few."""

    def __init__(self, path: str) -> None:
        import pyarrow.parquet as pq

        self.path = path
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except Exception as e:  # pyarrow raises OSError and its own errors
            raise DataError(
                f"{path} cannot be read as Parquet: {e}. The file may be truncated or still being written "
                f"({os.path.getsize(path)} bytes); write or download it again."
            ) from e
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._ends = list(itertools.accumulate(counts))
        self._cached: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Only the path: a copy in another process opens the file for itself."""
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        group = bisect.bisect_right(self._ends, index)
        start = self._ends[group - 1] if group else 0
        row: dict[str, Any] = self._group(group).slice(index - start, 1).to_pylist()[0]
        return row

    def _group(self, group: int) -> Any:
        if group not in self._cached:
            while len(self._cached) >= 8:
                self._cached.pop(next(iter(self._cached)))
            try:
                self._cached[group] = self._file.read_row_group(group)
            except Exception as e:
                raise DataError(
                    f"{self.path} is damaged: row group {group} of {len(self._ends)} cannot be read: {e}. "
                    "Write or download the file again."
                ) from e
        return self._cached[group]


class _Joined(Sequence[Mapping[str, Any]]):
    """Several sequences one after another."""

    def __init__(self, parts: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]
