"""Installed distributions that mention our entry-point groups, read from their metadata as text.

`importlib.metadata` is not used on the usual path: importing it takes longer than everything else that
`nemo-rl --help` does. What it would find in folders of `sys.path` is found here, in the same order, the
first of two equal names winning. Where another finder than Python's own is installed, or `sys.path`
holds an archive, `importlib.metadata` is asked for what there is, and the files are read here all the same: it
refuses what is not UTF-8, and one such file would keep every command from starting.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib import metadata

__all__ = ["Distribution", "distributions", "normalize"]


def normalize(name: str) -> str:
    """The canonical form of a distribution's name (PEP 503): `NeMo_RL.core` is `nemo-rl-core`."""
    return re.sub(r"[-_.]+", "-", name).lower()


class Distribution:
    """One installed distribution.

    Args:
        name: Canonical name.
        version: Version as text.
        raw: Returns a metadata file (`METADATA`, `entry_points.txt`), or None if there is none.
        location: Where the metadata lies, for messages.
    """

    def __init__(self, name: str, version: str, raw: Callable[[str], bytes | None], location: str) -> None:
        self.name = name
        self.version = version
        self._raw = raw
        self.location = location

    def __repr__(self) -> str:
        return f"Distribution({self.name!r}, {self.version!r})"

    def read(self, filename: str) -> str | None:
        """A metadata file as text, or None if there is none; what is not UTF-8 is replaced."""
        return _as_text(self._raw(filename))

    @cached_property
    def problem(self) -> str | None:
        """Which of its metadata files cannot be read, and why; None if all can."""
        for filename in ("entry_points.txt", "METADATA", "PKG-INFO"):
            try:
                (self._raw(filename) or b"").decode("utf-8")
            except UnicodeDecodeError as error:
                found = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
                return f"its {filename} in {self.location} is not UTF-8 text ({found})"
        return None

    @property
    def requires(self) -> list[str]:
        """Requirement lines of the distribution, extras included."""
        metadata = self.read("METADATA") or self.read("PKG-INFO") or ""
        lines = [
            line.partition(":")[2].strip() for line in _headers(metadata) if line.lower().startswith("requires-dist:")
        ]
        if not lines:  # an egg-info folder of an old editable install
            for line in (self.read("requires.txt") or "").splitlines():
                if line.startswith("["):
                    break
                lines.append(line.strip())
        return [line for line in lines if line]

    @cached_property
    def editable(self) -> bool:
        """Whether the code is run from a working tree (PEP 610), so that its version says little."""
        text = self.read("direct_url.json")
        return bool(text and re.search(r'"editable"\s*:\s*true', text))


def _as_text(raw: bytes | None) -> str | None:
    # NUL bytes are what is left of UTF-16; names can be told without them.
    return None if raw is None else raw.decode("utf-8", errors="replace").removeprefix("\ufeff").replace("\0", "")


def _headers(metadata: str) -> list[str]:
    return metadata.replace("\r\n", "\n").partition("\n\n")[0].split("\n")


def _header(metadata: str, key: str) -> str | None:
    for line in _headers(metadata):
        name, colon, value = line.partition(":")
        if colon and name.lower() == key:
            return value.strip()
    return None


def _reader(folder: str) -> Callable[[str], bytes | None]:
    def read(filename: str) -> bytes | None:
        try:
            return Path(folder, filename).read_bytes()
        except OSError:
            return None

    return read


def _reader_of(found: metadata.Distribution) -> Callable[[str], bytes | None]:
    """Of a distribution of `importlib.metadata`."""

    def read(filename: str) -> bytes | None:
        try:
            text = found.read_text(filename)
        except UnicodeDecodeError as error:
            return bytes(error.object)
        except Exception:  # another finder's own distribution, or an archive that cannot be read
            return None
        return None if text is None else str(text).encode("utf-8", errors="surrogateescape")

    return read


def _in_folder(folder: str) -> Iterator[Distribution]:
    try:
        with os.scandir(folder or ".") as found:
            names = sorted(entry.name for entry in found if entry.name.endswith((".dist-info", ".egg-info")))
    except OSError:
        return
    for filename in names:
        path = os.path.join(folder or ".", filename)
        stem = filename.rpartition(".")[0]
        name, _, version = stem.partition("-")
        if filename.endswith(".dist-info"):
            yield Distribution(normalize(name), version, _reader(path), path)
        else:
            metadata = _as_text(_reader(path)("PKG-INFO")) or ""
            version = _header(metadata, "version") or version.partition("-")[0]
            yield Distribution(normalize(_header(metadata, "name") or name), version, _reader(path), path)


def _by_importlib() -> Iterator[Distribution]:
    from importlib import metadata

    for found in metadata.distributions():
        read = _reader_of(found)
        headers = _as_text(read("METADATA") or read("PKG-INFO")) or ""
        name = _header(headers, "name")
        if name:  # a folder that a failed uninstall left behind has none
            yield Distribution(normalize(name), _header(headers, "version") or "0", read, _location(found))


def _location(found: metadata.Distribution) -> str:
    try:
        return str(found.locate_file(""))
    except Exception:  # another finder need not know files
        return "an unknown place"


def _only_folders() -> bool:
    others = [
        f for f in sys.meta_path if hasattr(f, "find_distributions") and getattr(f, "__name__", "") != "PathFinder"
    ]
    return not others and not any(os.path.isfile(entry) for entry in sys.path)


def distributions() -> Iterable[Distribution]:
    """Every installed distribution once, in the order of `sys.path`."""
    found: Iterable[Distribution]
    if _only_folders():
        found = (dist for folder in dict.fromkeys(sys.path) for dist in _in_folder(folder))
    else:
        found = _by_importlib()
    seen: set[str] = set()
    for dist in found:
        if dist.name not in seen:
            seen.add(dist.name)
            yield dist
