"""Files and folders that appear under their name only when they are whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["published", "replace", "sync"]


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """Give a place beside `path` to write a file or a folder to; what stands there at the end becomes `path`.

    Afterwards either the whole of it is there, or, after an error, what was there before.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    _remove(unfinished)
    try:
        yield unfinished
        replace(unfinished, path)
    except BaseException:
        _remove(unfinished)
        raise


def replace(unfinished: Path, final: Path) -> None:
    """Move a file or folder to its name. A folder of that name makes room first, as `.old-<name>`.

    A process that ends between the two moves of a folder leaves the old one under that name.
    """
    old = final.with_name(f".old-{final.name}")
    if unfinished.is_dir() and final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    os.replace(unfinished, final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
