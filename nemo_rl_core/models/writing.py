"""Writing of a Hugging Face checkpoint while its weights arrive, so that no process holds them all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_rl_core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["write_model"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LAYER = re.compile(r"\.(\d+)\.")


def write_model(
    folder: Path,
    weights: Iterator[tuple[str, Tensor]],
    model: PreTrainedModel | None,
    *,
    shard_size: int = 5_000_000_000,
) -> None:
    """Write config.json and safetensors files that `from_pretrained` loads.

    `weights` is exhausted whatever happens, so that it may be a collective.

    Args:
        folder: Without a checkpoint; it is made if need be.
        weights: (Hugging Face name, whole tensor of any shape [...]), tied ones once.
        model: The Hugging Face module, with or without weights of its own; None on a process that does not write.
        shard_size: Bytes after which a new file is begun, at the end of a layer. One file has no index.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    from safetensors import SafetensorError

    try:
        if model is not None:
            _write(folder, weights, model, shard_size)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot write the model to {folder}: {error}. Check free space.") from error
    finally:
        for _ in weights:
            pass


def _write(folder: Path, weights: Iterator[tuple[str, Tensor]], model: PreTrainedModel, shard_size: int) -> None:
    """Write weights of any shape [...] by name, one file after another."""
    files: list[Path] = []
    shard: dict[str, Tensor] = {}
    size = 0
    last = ""
    for name, tensor in weights:
        if size >= shard_size and _layer(name) != _layer(last):
            files.append(_write_shard(folder, shard, model, len(files)))
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu()
        size += tensor.numel() * tensor.element_size()
        last = name
    files.append(_write_shard(folder, shard, model, len(files)))
    if len(files) == 1:
        files[0].rename(folder / _SINGLE)
    else:
        _index(folder, files)


def _layer(name: str) -> str | None:
    """Number of the layer: a file's weights may be made of several of the model's, but of one layer's."""
    match = _LAYER.search(name)
    return match[1] if match else None


def _write_shard(folder: Path, shard: dict[str, Tensor], model: PreTrainedModel, number: int) -> Path:
    """Let the Hugging Face library write a part as if it were all, with the names and forms of its files."""
    model.save_pretrained(folder, state_dict=shard, max_shard_size=1 << 60)
    return (folder / _SINGLE).rename(folder / f".part-{number}.safetensors")


def _index(folder: Path, files: list[Path]) -> None:
    """Give the files their final names, and write which of them has which weight."""
    from safetensors import safe_open

    places, total = {}, 0
    for number, file in enumerate(files, start=1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        file.rename(folder / name)
        with safe_open(str(folder / name), framework="pt") as opened:
            places.update(dict.fromkeys(opened.keys(), name))
        total += (folder / name).stat().st_size
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2, sort_keys=True)
    (folder / _INDEX).write_text(text + "\n", encoding="utf-8")
