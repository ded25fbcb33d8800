"""Files with a few rows, for `nemo-rl plugins check`: a source cannot be checked without something to read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["csv_file", "huggingface_folder", "jsonl_file", "parquet_file"]

Example = Callable[[Path], Mapping[str, str]]
"""Options of a source that reads what is written into the folder."""

_ROWS = [{"prompt": f"{a} + {a}?", "answer": str(a + a)} for a in range(10)]


def jsonl_file(folder: Path) -> Mapping[str, str]:
    """One object a line."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _ROWS), encoding="utf-8")
    return {"path": str(path)}


def csv_file(folder: Path) -> Mapping[str, str]:
    """A header and a line for each row."""
    path = folder / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(_ROWS[0]))
        writer.writeheader()
        writer.writerows(_ROWS)
    return {"path": str(path)}


def parquet_file(folder: Path) -> Mapping[str, str]:
    """Two row groups."""
    import pyarrow
    import pyarrow.parquet

    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_ROWS), path, row_group_size=5)
    return {"path": str(path)}


def huggingface_folder(folder: Path) -> Mapping[str, str]:
    """A data set as `save_to_disk` leaves it."""
    import datasets

    datasets.Dataset.from_list(_ROWS).save_to_disk(folder / "saved")
    return {"path": str(folder / "saved")}
