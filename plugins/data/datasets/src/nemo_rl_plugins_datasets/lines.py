"""Lines of a file by number, with only their offsets in memory."""

from __future__ import annotations

import gzip
import mmap
import os
import zlib
from array import array
from typing import Any

from nemo_rl_core.errors import DataError

__all__ = ["IndexedLines"]

_CHUNK = 1 << 24


class IndexedLines:
    """The lines of a file that hold more than white space.

    The file is mapped into memory; per line an offset and a number of 8 bytes each are kept, so that ten
    gigabytes of rows cost some hundred megabytes at most. A gzipped file is unpacked into memory.

    Raises:
        DataError: The file cannot be read or its compression is damaged.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._data = _bytes_of(path)
        except (OSError, EOFError, zlib.error) as e:
            damaged = " The file may be truncated; write or download it again." if path.endswith(".gz") else ""
            raise DataError(f"{path} cannot be read: {e}.{damaged}") from e
        self._starts = array("q")
        self._numbers = array("q")
        self._index()

    def __len__(self) -> int:
        """Number of lines that are not blank."""
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[int, bytes]:
        """(line number in the file from 1, its bytes)."""
        start = self._starts[index]
        end = self._data.find(b"\n", start)
        return self._numbers[index], bytes(self._data[start : end if end >= 0 else len(self._data)])

    def __getstate__(self) -> dict[str, Any]:
        """Only the path: a copy in another process opens the file for itself."""
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the file again."""
        self.__init__(state["path"])  # type: ignore[misc]

    def _index(self) -> None:
        start, number, size = 0, 1, len(self._data)
        while start < size:
            end = self._data.find(b"\n", start)
            end = size if end < 0 else end
            # Most lines begin with their object; only the others are looked at as a whole.
            if self._data[start] == 0x7B or self._data[start:end].strip():
                self._starts.append(start)
                self._numbers.append(number)
            start, number = end + 1, number + 1


def _bytes_of(path: str) -> Any:
    if path.endswith(".gz"):
        unpacked = bytearray()
        with gzip.open(path) as file:
            while chunk := file.read(_CHUNK):
                unpacked += chunk
        return unpacked
    if os.path.getsize(path) == 0:
        return b""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
