"""Files in memory that the processes of one machine share, such as weights for an engine."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_rl_core.errors import ResourceError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SharedFile", "map_shared", "sweep"]

_PREFIX = "nemo-rl-refit-"
_SHARED = Path("/dev/shm")
_YOUNG_S = 60.0
"""A file this young may be one whose maker has not locked it yet."""
_sweeping = threading.Lock()
_swept: set[str] = set()


class SharedFile:
    """A new file of `num_bytes`, whose memory is reserved: to write to it cannot fail.

    It is locked as long as it is open here, by which `sweep` tells it from what a killed process left.

    Args:
        num_bytes: Its size.
        fix: What makes the file smaller, for the error.
        reserve: Its memory now; else before it is written to, with `reserve`.

    Raises:
        ResourceError: There is not enough memory of this kind.

    Attributes:
        path: What other processes open it by.
    """

    def __init__(self, num_bytes: int, *, fix: str, reserve: bool = True) -> None:
        folder = str(_SHARED if _SHARED.is_dir() else tempfile.gettempdir())
        sweep(folder)
        self._descriptor, self.path = tempfile.mkstemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=folder)
        self._fix = fix
        self.num_bytes = max(num_bytes, 1)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, self.num_bytes)
            if reserve:
                self.reserve(0, self.num_bytes)
        except BaseException:
            self.close()
            raise

    def reserve(self, offset: int, num_bytes: int) -> None:
        """Have memory for `num_bytes` from `offset` on.

        Raises:
            ResourceError: There is not enough memory of this kind.
        """
        try:
            if num_bytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._descriptor, offset, num_bytes)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            folder = os.path.dirname(self.path)
            raise ResourceError(_too_small(folder, self.num_bytes, self._fix)) from error

    def map(self) -> Tensor:
        """Its bytes, uint8 of shape [num_bytes]."""
        return map_shared(self.path, self.num_bytes)

    def unlink(self) -> None:
        """Take its name away; what is mapped stays."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)

    def close(self) -> None:
        """Unlink it and let it go. May be called twice."""
        self.unlink()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


def map_shared(path: str, num_bytes: int) -> Tensor:
    """The bytes of a shared file, uint8 of shape [num_bytes]."""
    import torch

    return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)


def sweep(folder: str) -> list[str]:
    """Remove the shared files that killed processes left in `folder`, once in a process; returns their names."""
    with _sweeping:
        if folder in _swept:
            return []
        _swept.add(folder)
    return [path.name for path in Path(folder).glob(f"{_PREFIX}*") if _remove_if_left(path)]


def _remove_if_left(path: Path) -> bool:
    with contextlib.suppress(OSError):  # gone already, in use, or another user's
        if time.time() - path.stat().st_mtime < _YOUNG_S:
            return False
        descriptor = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            return True
        finally:
            os.close(descriptor)
    return False


def _too_small(folder: str, num_bytes: int, fix: str) -> str:
    found, mib = os.statvfs(folder), 1 << 20
    total, free = (number * found.f_frsize / mib for number in (found.f_blocks, found.f_bavail))
    return (
        f"No room for {num_bytes / mib:.0f} MiB of shared memory: {folder} has {total:.0f} MiB, of which {free:.0f} "
        f"are free. {fix} Or make it larger: in Docker with "
        "`--shm-size 8g` (its default is 64 MiB) or `--ipc=host`, in Kubernetes with an emptyDir of medium Memory."
    )
