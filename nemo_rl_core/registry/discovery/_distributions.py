"""The installed distributions that mention our entry-point groups, read from their metadata as text.

`importlib.metadata` is not used for folders: importing it takes longer than everything else that `nemo-rl --help`
does, and it cannot read a file that is not UTF-8. What it would find in folders of `sys.path` is found here, in the
same order, the first of two equal names winning. It is asked for archives, and where another finder than Python's own
is installed. Nothing that lies in a metadata file makes reading it fail: what cannot be read is said by `damage`.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_rl_core.errors import describe

_log = logging.getLogger("nemo_rl_core.registry")

__all__ = ["Distribution", "distributions", "normalize"]


def normalize(name: str) -> str:
    """The canonical form of a distribution's name (PEP 503): `NeMo_RL.core` is `nemo-rl-core`."""
    return re.sub(r"[-_.]+", "-", name).lower()


class Distribution:
    """One installed distribution.

    Args:
        name: Canonical name.
        version: Version as text.
        read: Returns the bytes of a metadata file (`METADATA`, `entry_points.txt`), or None if there is none.
        location: Where the metadata lies, for messages.
    """

    def __init__(self, name: str, version: str, read: Callable[[str], bytes | None], location: str) -> None:
        self.name = name
        self.version = version
        self._read = read
        self.location = location

    def read(self, filename: str) -> str | None:
        """A metadata file as text, or None if there is none; bytes that are no UTF-8 are replaced."""
        found = self._read(filename)
        return None if found is None else found.decode("utf-8", errors="replace")

    @property
    def damage(self) -> str | None:
        """Why its metadata cannot be read as it is meant, or None."""
        for filename in ("METADATA", "PKG-INFO", "entry_points.txt"):
            try:
                (self._read(filename) or b"").decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"byte {error.object[error.start]:#04x} at {error.start}"
                return f"its {filename} is not UTF-8 ({where} of {self.location}); install it again"
        return None

    def __repr__(self) -> str:
        return f"Distribution({self.name!r}, {self.version!r})"

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
            metadata = (_reader(path)("PKG-INFO") or b"").decode("utf-8", errors="replace")
            version = _header(metadata, "version") or version.partition("-")[0]
            yield Distribution(normalize(_header(metadata, "name") or name), version, _reader(path), path)


def _foreign(finder: Any, path: list[str] | None = None) -> Iterator[Distribution]:
    """What a finder of `importlib.metadata` knows, one damaged distribution not hiding the others."""
    from importlib.metadata import DistributionFinder

    context = DistributionFinder.Context() if path is None else DistributionFinder.Context(path=path)
    try:
        found = iter(finder.find_distributions(context))
        while (each := next(found, None)) is not None:
            if (dist := _as_ours(each)) is not None:
                yield dist
    except Exception as error:
        _log.warning("%r cannot list its distributions and is passed over: %s", finder, describe(error))


def _as_ours(found: Any) -> Distribution | None:
    def read(filename: str) -> bytes | None:
        try:
            text = found.read_text(filename)
        except UnicodeDecodeError as error:
            return bytes(error.object)
        except Exception:  # an archive that was cut, a finder with a fault of its own
            return None
        return None if text is None else str(text).encode()

    metadata = (read("METADATA") or read("PKG-INFO") or b"").decode("utf-8", errors="replace")
    name = _header(metadata, "name")
    if not name:  # a folder that a failed uninstall left behind has none
        return None
    return Distribution(normalize(name), _header(metadata, "version") or "0", read, str(getattr(found, "_path", "")))


def distributions() -> Iterable[Distribution]:
    """Every installed distribution once, in the order of `sys.path`; then those of other finders than Python's."""
    seen: set[str] = set()
    for dist in _all():
        if dist.name not in seen:
            seen.add(dist.name)
            yield dist


def _all() -> Iterator[Distribution]:
    for entry in dict.fromkeys(sys.path):
        if os.path.isfile(entry):
            from importlib.metadata import MetadataPathFinder

            yield from _foreign(MetadataPathFinder, [entry])
        else:
            yield from _in_folder(entry)
    for finder in sys.meta_path:
        if hasattr(finder, "find_distributions") and getattr(finder, "__name__", "") != "PathFinder":
            yield from _foreign(finder)
