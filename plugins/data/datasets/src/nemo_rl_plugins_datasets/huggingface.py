"""Rows from Hugging Face: a hub name, a folder written by `save_to_disk`, or a folder of data files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from attrs import field, frozen, validators

from nemo_rl_core.errors import DataError
from nemo_rl_plugins_datasets.examples import Example, huggingface_folder

__all__ = ["HuggingFaceOptions", "HuggingFaceSource"]

_DATA_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".jsonl.gz")
_NOT_HUB_SUFFIXES = (*_DATA_SUFFIXES, ".gz", ".zip", ".tar", ".tsv", ".ndjson", ".txt", ".yaml", ".yml", ".py")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@frozen(kw_only=True)
class HuggingFaceOptions:
    """Options of a Hugging Face dataset."""

    path: str = field(validator=validators.min_len(1))
    """Hub name such as `openai/gsm8k`, or a local folder."""
    name: str | None = None
    """Configuration (subset), such as `main`."""
    split: str = "train"
    """Split; slices such as `train[:10%]` work for what is not streamed."""
    revision: str | None = None
    """Commit, branch or tag of the hub repository; name a commit for a run that can be repeated."""
    streaming: bool = False
    """Read rows as they come rather than downloading the data first."""
    data_files: str | None = None
    """Files of the repository or folder to read, as a glob."""
    cache_dir: str | None = None
    """Where downloads are kept; None is the library's own place."""


class HuggingFaceSource:
    """Loads through the `datasets` library. No code of a repository is ever run."""

    config_class: ClassVar[type] = HuggingFaceOptions
    example: ClassVar[Example] = staticmethod(huggingface_folder)

    def __init__(self, config: HuggingFaceOptions) -> None:
        self.config = config

    @classmethod
    def accepts(cls, source: str) -> bool:
        """A folder of data files or one written by `save_to_disk`, or what looks like `owner/name`."""
        if os.path.isdir(source):
            return _is_saved(source) or any(str(p).endswith(_DATA_SUFFIXES) for p in Path(source).rglob("*"))
        return (
            not os.path.exists(source) and bool(_HUB_NAME.fullmatch(source)) and not source.endswith(_NOT_HUB_SUFFIXES)
        )

    def load(self) -> Any:
        """A `datasets.Dataset`, or an `IterableDataset` when streaming.

        Raises:
            DataError: The data are not there, cannot be reached, or have no such split or configuration;
                says which there are.
        """
        try:
            import datasets
        except ImportError as e:
            raise DataError("Reading Hugging Face datasets needs the package `datasets`: pip install datasets.") from e
        path = os.path.expanduser(self.config.path)
        try:
            loaded = datasets.load_from_disk(path) if _is_saved(path) else self._loaded(datasets, path)
        except DataError:
            raise
        except Exception as e:
            raise self._explained(e) from e
        if isinstance(loaded, Mapping):  # a saved DatasetDict holds all splits
            if self.config.split not in loaded:
                splits = ", ".join(map(repr, loaded))
                raise DataError(f"{path!r} has no split {self.config.split!r}. It has: {splits}. Correct `split`.")
            loaded = loaded[self.config.split]
        return loaded

    def _loaded(self, datasets: Any, path: str) -> Any:
        options: dict[str, Any] = {"split": self.config.split, "streaming": self.config.streaming}
        for name in ("name", "revision", "data_files", "cache_dir"):
            value = getattr(self.config, name)
            if value is not None:
                options[name] = value
        return datasets.load_dataset(path, **options)

    def _explained(self, error: Exception) -> DataError:
        """What the library's error means and what to do."""
        what = f"Hugging Face dataset {self.config.path!r}"
        text = " ".join(str(error).split())[:400]
        kind = type(error).__name__
        if os.path.isdir(os.path.expanduser(self.config.path)):
            return DataError(f"Folder {self.config.path!r} cannot be loaded as a dataset: {kind}: {text}")
        if ("split" in text.lower() and "unknown" in text.lower()) or "Bad split" in text:
            return DataError(f"{what} has no split {self.config.split!r}: {text} Correct `split`.")
        if "Config name is missing" in text or "BuilderConfig" in text:
            return DataError(f"{what}: {text} Set `name` to one of its configurations.")
        if "gated" in text.lower() or kind == "GatedRepoError":
            return DataError(f"{what} is gated. Accept its terms on the hub, then log in with `hf auth login`.")
        if _is_connection(error):
            return DataError(
                f"{what} cannot be reached and is not in the local cache ({kind}: {text}) Check the network and "
                "HF_HUB_OFFLINE, or download it elsewhere, `save_to_disk`, and give the folder as the source."
            )
        return DataError(f"{what} cannot be loaded ({kind}: {text}) Check the name, `name`, `split` and `revision`.")


def _is_saved(path: str) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def _is_connection(error: BaseException | None) -> bool:
    """Whether the network, or its being switched off, stands behind an error."""
    seen = 0
    while error is not None and seen < 8:
        name = type(error).__name__
        if isinstance(error, (ConnectionError, TimeoutError)) or re.search(r"Connect|Timeout|Offline|Network", name):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False
