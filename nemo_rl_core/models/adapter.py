"""Low-rank adapters in PEFT's format: the folder of an adapter serves as a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["add_adapter", "base_of", "is_classifier"]

_CONFIG = "adapter_config.json"


def _read(model_name: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder of an adapter and its configuration; None for any other model."""
    folder = Path(model_name).expanduser()
    if not (folder / _CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    try:
        settings = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"The adapter in {folder} cannot be read: {_CONFIG}: {error}.") from error
    return folder, settings if isinstance(settings, dict) else {}


def base_of(model_name: str) -> str | None:
    """The model below an adapter, if the name is the folder of one (and not of a whole model).

    Raises:
        ConfigError: The adapter does not say what it was trained on.
    """
    read = _read(model_name)
    if read is None:
        return None
    folder, config = read
    base = config.get("base_model_name_or_path")
    if not base:
        raise ConfigError(
            f"The adapter in {folder} does not say which model it belongs to: set base_model_name_or_path in its "
            f"{_CONFIG}."
        )
    return str(base)


def is_classifier(model_name: str) -> bool:
    """Whether the folder is an adapter that was trained with a scalar head."""
    read = _read(model_name)
    return read is not None and read[1].get("task_type") == "SEQ_CLS"


def add_adapter(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """Add the adapter to the model's weights, with the adapter's head if it has one.

    Args:
        model: The base, of `transformers`, on the CPU.
        folder: Folder of the adapter.

    Raises:
        ConfigError: PEFT is not installed, or the adapter is damaged or does not fit the model.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError(
            f"{folder} is an adapter, and to load it the package peft is needed, which is not installed: "
            "pip install peft"
        ) from error
    if not any(Path(folder).expanduser().glob("adapter_model.*")):
        raise ConfigError(f"The adapter in {folder} has no weights: there is no adapter_model.safetensors.")
    try:
        merged: PreTrainedModel = PeftModel.from_pretrained(model, str(Path(folder).expanduser())).merge_and_unload()
        return merged
    except Exception as error:  # a file that is missing, cut off, of another kind or of another model
        first = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"The adapter in {folder} cannot be added to the model it names: {type(error).__name__}: {first}"
        ) from error
