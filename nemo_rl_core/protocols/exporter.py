"""Contract of an exporter: writes a trained policy in another format or to another place."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from attrs import frozen

__all__ = ["ExportReport", "Exporter"]


@frozen(kw_only=True)
class ExportReport:
    """Result of an export."""

    location: str
    """Path or address of the export."""
    files: tuple[str, ...] = ()
    """Sorted names of the files below `location`."""
    num_bytes: int = 0
    """Size of these files together."""


@runtime_checkable
class Exporter(Protocol):
    """Exports a trained policy. A component of group `nemo_rl.exporters`, created with its config.

    The source is a folder in Hugging Face format: `config.json`, weights in `*.safetensors` (with
    `model.safetensors.index.json` if there are several), the tokenizer's files. An exporter only reads it.

    An export is complete or absent: write beside the target and rename, or upload and then publish. Exporting
    again to the same target replaces the export by an equal one.

    Attributes:
        config_class: attrs class of the exporter's options.
    """

    config_class: ClassVar[type]

    def export(self, model_dir: Path, target: str | Path) -> ExportReport:
        """Export the model in `model_dir` to `target`, creating missing parent folders.

        Raises:
            CheckpointError: The source is not a complete model, or the target cannot be written. The message names the
                file, and the previous content of the target is unchanged.
        """
        ...
