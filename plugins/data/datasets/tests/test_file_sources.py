"""File sources: real files, and broken ones named with their line."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys

import pytest

from nemo_rl_core.errors import DataError
from nemo_rl_plugins_datasets.files import CsvOptions, CsvSource, FileOptions, JsonlSource, ParquetSource
from nemo_rl_plugins_datasets.lines import IndexedLines

ROWS = [{"prompt": f"p{i} é", "answer": i} for i in range(5)]


def text_of(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def rows_of(source, path):
    return list(source(source.config_class(path=str(path))).load())


# -- JSONL ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        text_of(ROWS),
        text_of(ROWS).rstrip("\n"),
        "\n  \n" + text_of(ROWS).replace("\n", "\n\n"),
        text_of(ROWS).replace("\n", "\r\n"),
        "\ufeff" + text_of(ROWS),
        " " + text_of(ROWS),
    ],
    ids=["plain", "no last newline", "blank lines", "windows", "byte order mark", "indented"],
)
def test_jsonl(tmp_path, text):
    path = tmp_path / "x.jsonl"
    path.write_bytes(text.encode())
    assert rows_of(JsonlSource, path) == ROWS


def test_jsonl_gzipped_globbed_and_in_a_folder(tmp_path):
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text_of(ROWS[2:]).encode()))
    (tmp_path / "a.jsonl").write_text(text_of(ROWS[:2]))
    (tmp_path / "note.txt").write_text("not data")
    for path in (tmp_path / "*.jsonl*", tmp_path):
        rows = JsonlSource(FileOptions(path=str(path))).load()
        assert list(rows) == ROWS
        assert (len(rows), rows[-1], rows[1:3]) == (5, ROWS[4], ROWS[1:3])
        with pytest.raises(IndexError):
            rows[5]


def test_json_list(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(ROWS))
    assert rows_of(JsonlSource, path) == ROWS
    path.write_text(text_of(ROWS))
    assert rows_of(JsonlSource, path) == ROWS
    path.write_text(json.dumps([*ROWS, 3]))
    with pytest.raises(DataError, match="Item 5 of the list"):
        rows_of(JsonlSource, path)
    path.write_text(json.dumps(ROWS)[:-4])
    with pytest.raises(DataError, match="may be truncated"):
        rows_of(JsonlSource, path)


def test_jsonl_holds_offsets_not_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"broken\n{"a": 3}\n')
    rows = JsonlSource(FileOptions(path=str(path))).load()  # the broken line is not parsed before it is asked for
    assert (len(rows), rows[0], rows[2]) == (3, {"a": 1}, {"a": 3})
    with pytest.raises(DataError, match=r"x\.jsonl:2 is not valid JSON.*broken"):
        rows[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\n{"a": 2, "b', r"x\.jsonl:3 .*may be truncated"),
        (b'{"a": 1}\n[1, 2]\n', r"x\.jsonl:2 holds a list"),
        (b'{"a": "\xff"}\n', r"x\.jsonl:1 is not valid JSON"),
    ],
)
def test_broken_jsonl_names_file_and_line(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        rows_of(JsonlSource, path)


def test_truncated_gzip(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(text_of(ROWS * 50).encode())[:-20])
    with pytest.raises(DataError, match=r"x\.jsonl\.gz cannot be read.*truncated"):
        rows_of(JsonlSource, path)


def test_empty_file_has_no_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("")
    assert rows_of(JsonlSource, path) == []


def test_rows_travel_to_another_process_as_a_path(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(text_of(ROWS))
    packed = pickle.dumps(JsonlSource(FileOptions(path=str(path))).load())
    assert b"answer" not in packed
    assert list(pickle.loads(packed)) == ROWS
    assert IndexedLines(str(path))[4][0] == 5


# -- CSV ------------------------------------------------------------------------------------------------------


def test_csv_and_tsv(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('\ufeffprompt,answer\n"two, with\na break",1\n\nplain,2\n', encoding="utf-8")
    assert rows_of(CsvSource, path) == [
        {"prompt": "two, with\na break", "answer": "1"},
        {"prompt": "plain", "answer": "2"},
    ]
    path = tmp_path / "x.tsv.gz"
    path.write_bytes(gzip.compress(b"a\tb\n1\t2\n"))
    assert rows_of(CsvSource, path) == [{"a": "1", "b": "2"}]
    path = tmp_path / "long.csv"
    path.write_text("a\n" + "x" * 200_000 + "\n")
    assert len(rows_of(CsvSource, path)[0]["a"]) == 200_000


def test_csv_delimiter(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a;b\n1;2\n")
    assert list(CsvSource(CsvOptions(path=str(path), delimiter=";")).load()) == [{"a": "1", "b": "2"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n3\n", r"x\.csv:3 has 1 values, but the header names 2 columns \(a, b\)"),
        ("a,b\n1,2,3\n", r"x\.csv:2 has 3 values"),
        ('a,b\n1,2\n"open,2\n', r"x\.csv cannot be read as CSV after line 2.*truncated"),
        ("", "no header"),
    ],
)
def test_broken_csv_names_file_and_line(tmp_path, content, message):
    path = tmp_path / "x.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        rows_of(CsvSource, path)


# -- Parquet --------------------------------------------------------------------------------------------------


def write_parquet(path, rows, **options):
    import pyarrow
    import pyarrow.parquet as pq

    pq.write_table(pyarrow.Table.from_pylist(rows), path, **options)


def test_parquet_row_groups_and_parts(tmp_path):
    many = [{"i": i, "messages": [{"role": "user", "content": str(i)}]} for i in range(25)]
    write_parquet(tmp_path / "a.parquet", many[:20], row_group_size=2)
    write_parquet(tmp_path / "b.parquet", many[20:])
    rows = ParquetSource(FileOptions(path=str(tmp_path / "*.parquet"))).load()
    assert list(rows) == many
    assert [rows[i]["i"] for i in (24, 0, 19, 20, 3)] == [24, 0, 19, 20, 3]


def test_truncated_parquet_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, ROWS)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as Parquet.*truncated"):
        rows_of(ParquetSource, path)


def test_damaged_parquet_data_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, [{"a": f"{i * 7919}"} for i in range(500)], compression="gzip", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(DataError, match="row group 0 of 1"):
        rows_of(ParquetSource, path)


# -- finding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [JsonlSource, CsvSource, ParquetSource])
def test_missing_files_and_empty_folders(tmp_path, source):
    with pytest.raises(DataError, match=r"nope\.x' does not exist"):
        rows_of(source, tmp_path / "nope.x")
    with pytest.raises(DataError, match="holds no file ending in"):
        rows_of(source, tmp_path)


def test_each_source_accepts_its_own_suffixes(tmp_path):
    for name, accepted in [
        ("a.jsonl", JsonlSource),
        ("A.JSONL.GZ", JsonlSource),
        ("data/*.csv", CsvSource),
        ("a.tsv", CsvSource),
        ("a.parquet", ParquetSource),
        ("a.txt", None),
        ("owner/name", None),
    ]:
        assert [s for s in (JsonlSource, CsvSource, ParquetSource) if s.accepts(name)] == [accepted][
            : accepted is not None
        ]
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    assert not JsonlSource.accepts(str(folder))


def test_importing_the_sources_imports_nothing_heavy():
    code = (
        "import sys, nemo_rl_plugins_datasets.files, nemo_rl_plugins_datasets.huggingface; "
        "sys.exit(any(m in sys.modules for m in ('datasets', 'pyarrow', 'pandas', 'torch', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
