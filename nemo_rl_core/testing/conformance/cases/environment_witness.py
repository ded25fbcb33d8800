"""Plays an episode in processes of its own, and tells what it gave there and what it left behind.

Set order depends on the hash seed, so a replay in the same process cannot see that an episode depends on it; nor that
it depends on the clock, the time zone, or random numbers that nobody seeded. And a process in which nothing else runs
is where traces of an episode can be told from those of the tests.
"""

from __future__ import annotations

import functools
import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import cloudpickle
from attrs import evolve, frozen

from nemo_rl_core.testing.conformance.cases.environment_case import EnvironmentCase

__all__ = ["SEED", "Testimony", "WitnessFailed", "testimonies"]

SEED = 3
"""Seed of the episodes."""
_PLACES: Sequence[Mapping[str, str]] = (
    {"PYTHONHASHSEED": "1", "TZ": "XXX-14"},
    {"PYTHONHASHSEED": "2", "TZ": "XXX+12"},  # another day there
    {"PYTHONHASHSEED": "5", "TZ": "XXX+12"},
)
"""Environment variables of each process; the first is watched, the others only replay."""
_START = (
    "import pickle, sys; from pathlib import Path; folder = Path(sys.argv[1]); "
    "sys.path[:] = pickle.loads((folder / 'path').read_bytes()); "
    "from {module} import testify; testify(folder, watched=sys.argv[2] == 'watched')"
)


class WitnessFailed(Exception):
    """The episode could not be played in another process; the message says why."""


@frozen(kw_only=True)
class Testimony:
    """What one process tells."""

    episodes: Sequence[object]
    """The good episode and the wrong one, as `PlayedEpisode.plain` has them."""
    changed: Sequence[str] = ()
    """What an episode changed in its classes and modules, in words."""
    changed_for_all: Sequence[str] = ()
    """What it changed for the whole process, in words."""
    left: Sequence[str] = ()
    """What still ran or was open when the episode was closed, in words."""
    held: Sequence[str] = ()
    """What was still held when nobody needed it any more, in words."""
    printed: str = ""
    """What it wrote to standard output and standard error."""
    failure: str = ""
    """Why the episode could not be played, with the last lines of the traceback."""


def testimonies(case: EnvironmentCase, timeout_s: float) -> tuple[Testimony, ...]:
    """What each process tells of this case; the first was watched. Asked again for an equal case it has the answer.

    Raises:
        WitnessFailed: The case cannot be sent to another process, or not be played there.
    """
    return _testimonies(_sent(evolve(case, config=case.options())), timeout_s)


def _sent(case: EnvironmentCase) -> bytes:
    """The case by the name of its module, and by value for a process that cannot import it."""
    module = sys.modules.get(getattr(case.environment, "__module__", "") or "")
    try:
        by_name = pickle.dumps(case, protocol=5)
    except Exception:
        by_name = b""
    try:
        by_value = _by_value(case, module)
    except Exception as error:
        if not by_name:
            raise WitnessFailed(
                f"the environment or its options cannot be sent to another process ({type(error).__name__}: {error})"
            ) from error
        by_value = b""
    return pickle.dumps((by_name, by_value), protocol=5)


_by_value_lock = threading.Lock()


def _by_value(case: EnvironmentCase, module: ModuleType | None) -> bytes:
    if module is None or module.__name__ in ("__main__", "builtins"):
        return bytes(cloudpickle.dumps(case, protocol=5))
    with _by_value_lock:
        cloudpickle.register_pickle_by_value(module)
        try:
            return bytes(cloudpickle.dumps(case, protocol=5))
        finally:
            cloudpickle.unregister_pickle_by_value(module)


@functools.lru_cache(maxsize=4)
def _testimonies(sent: bytes, timeout_s: float) -> tuple[Testimony, ...]:
    process_module = f"{__name__}_process"
    importlib.import_module(process_module)  # a mistake in it is told here
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(number) for number in range(len(_PLACES))]
        running: list[subprocess.Popen[bytes]] = []
        try:
            for folder, place in zip(folders, _PLACES, strict=True):
                running.append(_start(folder, sent, place, process_module, watched=not running))
            return tuple(_told(process, f, timeout_s) for process, f in zip(running, folders, strict=True))
        finally:
            for process in running:
                process.kill()
                process.wait()


def _start(
    folder: Path, sent: bytes, place: Mapping[str, str], module: str, *, watched: bool
) -> subprocess.Popen[bytes]:
    folder.mkdir()
    (folder / "path").write_bytes(pickle.dumps(sys.path))
    (folder / "case").write_bytes(sent)
    command = [sys.executable, "-c", _START.format(module=module), str(folder), "watched" if watched else "replayed"]
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(
            command, env={**os.environ, **place}, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )


def _told(process: subprocess.Popen[bytes], folder: Path, timeout_s: float) -> Testimony:
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise WitnessFailed(f"the episode was not through after {timeout_s:g} s in another process") from None
    answer = folder / "answer"
    if not answer.exists():
        last = (folder / "output").read_text(errors="replace").strip()[-600:]
        raise WitnessFailed(f"the process that played the episode ended with status {status}: {last or 'no output'}")
    try:
        told: Testimony = pickle.loads(answer.read_bytes())
    except Exception as error:
        raise WitnessFailed(f"what the episode gave cannot be read back ({type(error).__name__}: {error})") from error
    if told.failure:
        raise WitnessFailed(f"in another process the episode failed: {told.failure}")
    return told
