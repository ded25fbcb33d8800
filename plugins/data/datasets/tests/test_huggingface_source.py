"""Hugging Face data from local folders, and what is said when the hub is out of reach."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from nemo_rl_core.data.module import DataModule
from nemo_rl_core.errors import DataError
from nemo_rl_core.schema import DataConfig, DatasetConfig
from nemo_rl_plugins_datasets.files import CsvSource, JsonlSource, ParquetSource
from nemo_rl_plugins_datasets.huggingface import HuggingFaceOptions, HuggingFaceSource

datasets = pytest.importorskip("datasets")

ROWS = [{"prompt": f"p{i}", "answer": str(i)} for i in range(6)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def saved(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "train-00000-of-00001.parquet")
    datasets.Dataset.from_list(ROWS[:2]).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def load(path, **options):
    return HuggingFaceSource(HuggingFaceOptions(path=str(path), **options)).load()


def test_a_saved_dataset(saved):
    assert load(saved).to_list() == ROWS


def test_a_saved_dataset_with_splits(tmp_path):
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:2]))
    splits.save_to_disk(tmp_path / "splits")
    assert len(load(tmp_path / "splits", split="test")) == 2
    with pytest.raises(DataError, match=r"no split 'dev'\. It has: 'train', 'test'"):
        load(tmp_path / "splits", split="dev")


def test_a_folder_of_parquet_files(files):
    assert load(files).to_list() == ROWS
    assert load(files, split="test").to_list() == ROWS[:2]
    assert load(files, split="train[:3]").to_list() == ROWS[:3]
    assert list(load(files, streaming=True)) == ROWS
    with pytest.raises(DataError, match="dev"):
        load(files, split="dev")


def test_a_truncated_file_in_a_folder(tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "train.parquet").write_bytes(b"PAR1 nothing else")
    with pytest.raises(DataError, match="broken"):
        load(folder)


def test_what_it_accepts(saved, files, tmp_path):
    for source in (str(saved), str(files), "openai/gsm8k", "nvidia/OpenMathInstruct-2"):
        assert HuggingFaceSource.accepts(source)
    (tmp_path / "empty").mkdir()
    for source in (
        str(tmp_path / "empty"),
        "gsm8k",
        "a/b/c",
        "data/train.parquet",
        "data/notes.txt",
        "./x/y",
        "https://x.org/y",
    ):
        assert not HuggingFaceSource.accepts(source)


def test_offline_says_what_to_do(tmp_path):
    code = (
        "from nemo_rl_core.errors import DataError\n"
        "from nemo_rl_plugins_datasets.huggingface import HuggingFaceOptions, HuggingFaceSource\n"
        "try: HuggingFaceSource(HuggingFaceOptions(path='nobody/nothing')).load()\n"
        "except DataError as e: print(e)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert "'nobody/nothing' cannot be reached" in said and "save_to_disk" in said


class Registry:
    """The four sources of this package, by name, as the installed registry has them."""

    def __init__(self):
        files = {"csv": CsvSource, "jsonl": JsonlSource, "parquet": ParquetSource}
        self.components = {"huggingface": HuggingFaceSource, **files}

    def names(self, kind):
        return list(self.components)

    def resolve(self, kind, name):
        from nemo_rl_core.errors import PluginNotFound

        try:
            return self.components[name]
        except KeyError:
            raise PluginNotFound(f"No dataset named {name!r}.") from None


def test_a_path_alone_finds_the_right_source(saved, files, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "rows.csv").write_text("prompt,answer\n" + "".join(f"{r['prompt']},{r['answer']}\n" for r in ROWS))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    for source in (saved, files, tmp_path / "rows.jsonl", tmp_path / "rows.csv", tmp_path / "rows.parquet"):
        config = DataConfig(train=DatasetConfig(source=str(source)), shuffle=False)
        items = DataModule(config, seed=0, registry=Registry()).next(6)
        assert [{k: i.task[k] for k in ("prompt", "answer")} for i in items] == ROWS


def test_a_wrong_column_of_a_file_names_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q"}\n')
    config = DataConfig(train=DatasetConfig(source=str(path), columns={"prompt": "problem"}))
    with pytest.raises(DataError, match=r"rows\.jsonl.* has no column 'problem'.*It has: 'question'"):
        DataModule(config, seed=0, registry=Registry()).next(1)


def test_an_unknown_option_is_told(saved):
    config = DataConfig(train=DatasetConfig(source=str(saved), options={"splt": "test"}))
    with pytest.raises(ValueError, match=r"(?s)options\.splt.*did you mean `split`"):
        DataModule(config, seed=0, registry=Registry()).next(1)
