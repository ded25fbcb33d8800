"""The sources of this package against the contract of datasets."""

from __future__ import annotations

import csv
import gzip
import json

import pytest

from nemo_rl_core.testing import BrokenSource, DatasetContract
from nemo_rl_plugins_datasets.files import CsvOptions, CsvSource, FileOptions, JsonlSource, ParquetSource
from nemo_rl_plugins_datasets.huggingface import HuggingFaceOptions, HuggingFaceSource

ROWS = [{"prompt": f"{i} + {i}?", "answer": str(2 * i), "id": f"row-{i}"} for i in range(12)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def jsonl(path):
    return JsonlSource(FileOptions(path=str(path)))


class TestJsonlSource(DatasetContract):
    accepted = ("rows.jsonl", "rows.jsonl.gz")
    refused = ("", "owner/name", "rows.csv")

    @pytest.fixture(params=["one", "zipped", "list", "two"])
    def dataset(self, request, tmp_path):
        match request.param:
            case "one":
                (tmp_path / "rows.jsonl").write_text(LINES)
            case "zipped":
                (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
            case "list":
                (tmp_path / "rows.json").write_text(json.dumps(ROWS))
            case "two":
                (tmp_path / "a.jsonl").write_text(LINES)
                (tmp_path / "b.jsonl").write_text(LINES.replace("row-", "other-"))
        return jsonl(tmp_path)

    def broken(self, folder):
        (folder / "cut.jsonl").write_text(LINES[:-20])
        (folder / "middle.jsonl").write_text(LINES.replace('{"prompt": "3 + 3?"', '"prompt": "3 + 3?"'))
        (folder / "cut.jsonl.gz").write_bytes(gzip.compress(LINES.encode() * 50)[:-30])
        return {
            "a file cut short": BrokenSource(source=jsonl(folder / "cut.jsonl"), names=["cut.jsonl:12"]),
            "a broken line": BrokenSource(source=jsonl(folder / "middle.jsonl"), names=["middle.jsonl:4"]),
            "an archive cut short": BrokenSource(source=jsonl(folder / "cut.jsonl.gz"), names=["cut.jsonl.gz"]),
            "no file": BrokenSource(source=jsonl(folder / "none.jsonl"), names=["none.jsonl"]),
        }


class TestCsvSource(DatasetContract):
    accepted = ("rows.csv", "rows.tsv.gz")
    refused = ("", "owner/name", "rows.jsonl")

    @pytest.fixture
    def dataset(self, tmp_path):
        with (tmp_path / "rows.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
        return CsvSource(CsvOptions(path=str(tmp_path / "rows.csv")))

    def broken(self, folder):
        (folder / "short.csv").write_text('prompt,answer\n"1","2"\n"3"\n')
        (folder / "open.csv").write_text('prompt,answer\n"1","2"\n"3","4\n')
        (folder / "empty.csv").write_text("")
        files = {"short.csv": ["short.csv:3"], "open.csv": ["open.csv"], "empty.csv": ["empty.csv"]}
        return {
            name: BrokenSource(source=CsvSource(CsvOptions(path=str(folder / name))), names=names)
            for name, names in files.items()
        }


class TestParquetSource(DatasetContract):
    accepted = ("rows.parquet",)
    refused = ("", "owner/name", "rows.jsonl")

    @pytest.fixture
    def dataset(self, tmp_path):
        return ParquetSource(FileOptions(path=write_parquet(tmp_path / "rows.parquet")))

    def broken(self, folder):
        path = write_parquet(folder / "cut.parquet")
        data = (folder / "cut.parquet").read_bytes()
        (folder / "cut.parquet").write_bytes(data[: len(data) // 2])
        return {"a file cut short": BrokenSource(source=ParquetSource(FileOptions(path=path)), names=["cut.parquet"])}


class TestHuggingFaceSource(DatasetContract):
    accepted = ("owner/name",)
    refused = ("", "rows.jsonl", "name", "owner/name/third")

    @pytest.fixture(params=[False, True], ids=["saved", "streamed"])
    def dataset(self, request, tmp_path):
        import datasets

        if request.param:
            (tmp_path / "data").mkdir()
            (tmp_path / "data" / "train.jsonl").write_text(LINES)
            path, cache = str(tmp_path / "data"), str(tmp_path / "cache")
            return HuggingFaceSource(HuggingFaceOptions(path=path, streaming=True, cache_dir=cache))
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
        return HuggingFaceSource(HuggingFaceOptions(path=str(tmp_path / "saved")))

    def broken(self, folder):
        (folder / "empty").mkdir()
        source = HuggingFaceSource(HuggingFaceOptions(path=str(folder / "empty")))
        return {"a folder without data": BrokenSource(source=source, names=["empty"])}


def write_parquet(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=5)
    return str(path)
