"""Checkpoint files, written atomically and with a checksum for each.

`torch.load` does not notice a changed byte inside a tensor, so each file has its size and CRC-32 beside it.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_rl_core.errors import CheckpointError
from nemo_rl_core.machine.publish import published, sync

__all__ = ["capture_rng", "check_fits", "check_unchanged", "measure", "read", "restore", "restore_rng", "write"]

_BLOCK = 1 << 22


def write(path: Path, state: object) -> None:
    """Write `state` to `path`; afterwards either the whole new file is there or the old one.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written; no part of a file is left.
    """
    try:
        with published(path) as unfinished, published(_seal_path(path)) as seal:
            with unfinished.open("wb") as file:
                torch.save(state, file)
            sync(unfinished)
            size, checksum = measure(unfinished)
            seal.write_text(json.dumps({"file": path.name, "size": size, "crc32": checksum}) + "\n", encoding="utf-8")
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise CheckpointError(
            f"Cannot write the checkpoint file {path}: {error}. Check free space and permissions of {path.parent}."
        ) from error


def read(path: Path, *, map_location: str | torch.device = "cpu") -> Any:
    """Read what `write` wrote.

    Raises:
        CheckpointError: The file is missing, truncated, changed or not one of ours; names it.
    """
    _check_there(path)
    try:
        seal = json.loads(_seal_path(path).read_text(encoding="utf-8"))
        expected = (int(seal["size"]), int(seal["crc32"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"The checksum file {_seal_path(path)} of the checkpoint is missing or unreadable ({error}); the save was "
            "not finished. Resume from an older checkpoint."
        ) from error
    check_unchanged(path, *expected)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # whatever the unpickler meets, the file is at fault
        raise CheckpointError(f"The checkpoint file {path} cannot be read: {type(error).__name__}: {error}") from error


def check_unchanged(path: Path, size: int, checksum: int) -> None:
    """Compare a file with what `measure` gave when it was written.

    Raises:
        CheckpointError: The file is missing, truncated or changed; names it.
    """
    _check_there(path)
    found = measure(path)
    if found != (size, checksum):
        what = "truncated" if found[0] < size else "damaged"
        raise CheckpointError(
            f"The checkpoint file {path} is {what}: it has {found[0]} bytes (CRC-32 {found[1]:08x}), written were "
            f"{size} (CRC-32 {checksum:08x}). Resume from an older checkpoint."
        )


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"The checkpoint file {path} is missing. Give a folder that a finished save has written.")


def restore(path: Path, take: Callable[[dict[str, Any]], None]) -> None:
    """Read the checkpoint of a training worker and let `take` put it in place.

    Raises:
        CheckpointError: The file cannot be read, or `take` found that it is of another run (it raises what comes, a
            ValueError with the reason best).
    """
    state = read(path)
    try:
        take(state)
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"The checkpoint file {path} does not fit this run ({error}). It was written for another model, optimizer, "
            "precision, number or layout of workers; start in a new run_dir, or with checkpointing.resume: never."
        ) from error


def check_fits(state: Mapping[str, Any], identity: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Check that a state fits the run that is to continue from it.

    Args:
        state: What was read.
        identity: Values by name that the state must have too.
        weights: This worker's weights [...]; those of `state["weights"]` must have the same names and shapes.

    Raises:
        ValueError: Says what differs.
    """
    for name, value in identity.items():
        if state[name] != value:
            raise ValueError(f"its {name} is {state[name]!r}, here it is {value!r}")
    saved = state["weights"]
    if weights.keys() != saved.keys():
        raise ValueError(f"other parameters: {sorted(weights.keys() ^ saved.keys())[:4]}")
    if wrong := [name for name, tensor in weights.items() if tensor.shape != saved[name].shape]:
        raise ValueError(f"other shapes: {wrong[:4]}")


def _seal_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.crc.json")


def measure(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file.

    Raises:
        CheckpointError: It cannot be read; names it.
    """
    size = checksum = 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                size += len(block)
                checksum = zlib.crc32(block, checksum)
    except OSError as error:
        raise CheckpointError(f"The checkpoint file {path} cannot be read: {error}") from error
    return size, checksum


def capture_rng(device: torch.device) -> dict[str, Any]:
    """State of this process's random number generators."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(numbers), gauss]}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Undo what was drawn since `capture_rng`."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
