"""Contract of an exporter: takes a trained policy to another format or another place."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from attrs import frozen

__all__ = ["ExportReport", "Exporter"]


@frozen(kw_only=True)
class ExportReport:
    """What an export made."""

    location: str
    """Where the export is: a path, or an address such as a hub's."""
    files: tuple[str, ...] = ()
    """Names of its files below `location`, sorted."""
    num_bytes: int = 0
    """Bytes of these files."""


@runtime_checkable
class Exporter(Protocol):
    """Writes a policy elsewhere. A component of group `nemo_rl.exporters`, made with its config.

    The source is a folder in the format of Hugging Face: `config.json`, weights in `*.safetensors` (with
    `model.safetensors.index.json` if there are several), the tokenizer's files. It is only read.

    An export is whole or is not there: write beside the target and rename, or upload and then publish. Exporting
    again to the same target replaces what is there by the same.

    Attributes:
        config_class: attrs class of the exporter's options.
    """

    config_class: ClassVar[type]

    def export(self, model_dir: Path, target: str | Path) -> ExportReport:
        """Export the model in `model_dir` to `target`, whose missing parent folders are made.

        Raises:
            CheckpointError: The source is not a whole model, or the target cannot be written. Names the file, and
                leaves what was at the target before as it was.
        """
        ...
