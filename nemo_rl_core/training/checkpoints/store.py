"""Store of checkpoints, each of which is complete or absent.

A checkpoint is written into a hidden folder, listed with sizes and checksums in its `state.json`, flushed
to the disk and then renamed to `step_<n>`. A run killed at any moment leaves the former ones untouched.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from nemo_rl_core._version import __version__
from nemo_rl_core.errors import CheckpointError, DeadlineExceeded, WorkerDied
from nemo_rl_core.machine.publish import replace, sync

__all__ = ["Checkpoint", "CheckpointStore"]

logger = logging.getLogger(__name__)
_STATE = "state.json"
_FORMAT = 1


@frozen
class Checkpoint:
    """A published checkpoint."""

    step: int
    path: Path

    def state(self) -> dict[str, Any]:
        """State that was passed to `save`."""
        return dict(_read_state(self.path)["state"])


class CheckpointStore:
    """The checkpoints in one folder.

    Args:
        folder: Created at the first save.
        keep_last: How many of the newest are kept.
        keep_best: How many of the best by `metric` are kept besides.
        metric: Name looked up in `state["metrics"]`.
        higher_is_better: Direction of `metric`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 2,
        keep_best: int = 0,
        metric: str | None = None,
        higher_is_better: bool = True,
    ) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.metric = metric
        self.higher_is_better = higher_is_better

    def list(self) -> list[Checkpoint]:
        """Published checkpoints, oldest first, whole or not."""
        checkpoints = []
        for path in self.folder.glob("step_*"):
            number = path.name.removeprefix("step_")
            if number.isdigit() and path.is_dir():
                checkpoints.append(Checkpoint(int(number), path))
        return sorted(checkpoints, key=lambda c: c.step)

    def save(self, step: int, write: Callable[[Path], None], state: Mapping[str, Any]) -> Checkpoint:
        """Write a checkpoint and publish it.

        Args:
            step: Its number.
            write: Fills the folder it is given.
            state: Plain JSON data.

        Raises:
            CheckpointError: The disk is full or the folder cannot be written; nothing was published.
            WorkerDied: Who writes died; nothing was published.
            DeadlineExceeded: Who writes did not answer; nothing was published.
        """
        final = self.folder / f"step_{step}"
        temporary = self.folder / f".writing-step_{step}-{os.getpid()}"
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            _write_state(temporary, step, state)
            replace(temporary, final)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, (WorkerDied, DeadlineExceeded)):  # not a matter of the folder
                raise
            kept = self.list()
            newest = f"The newest checkpoint, {kept[-1].path}, is untouched." if kept else "There is no earlier one."
            raise CheckpointError(
                f"Could not save the checkpoint of step {step} to {final}: {_reason(error)}. {newest} "
                f"Free space on the disk (found {_free(self.folder)} free) or set another `run_dir`, then resume."
            ) from error
        self._retire(step)
        return Checkpoint(step, final)

    def load(self, resume: str) -> Checkpoint | None:
        """The newest whole checkpoint, or None if there is none (an error when `resume` is "must").

        A damaged one is named in a warning and the one before it is taken.

        Raises:
            CheckpointError: All that are there are damaged, or `resume` is "must" and none is there.
        """
        if resume == "never":
            return None
        self._sweep()
        problems: list[str] = []
        for checkpoint in reversed(self.list()):
            problem = _damage(checkpoint.path)
            if problem is None:
                for text in problems:
                    logger.warning("%s Resuming from the one before it, %s.", text, checkpoint.path)
                return checkpoint
            problems.append(problem)
        if problems:
            raise CheckpointError(
                " ".join(problems) + " No whole checkpoint is left. Restore the files, or start anew with "
                "checkpointing.resume=never or another run_dir."
            )
        if resume == "must":
            raise CheckpointError(
                f"checkpointing.resume is 'must', but there is no checkpoint in {self.folder}. "
                "Check run_dir, or set checkpointing.resume=auto."
            )
        return None

    def _sweep(self) -> None:
        """Remove what writers that are gone left behind."""
        for path in self.folder.glob(".writing-step_*"):
            pid = path.name.rsplit("-", 1)[-1]
            if not (pid.isdigit() and _alive(int(pid))):
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(".old-step_*"):
            target = self.folder / path.name.removeprefix(".old-")
            if target.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:  # killed between the two renames of a replacement
                path.rename(target)

    def _retire(self, newest: int) -> None:
        checkpoints = self.list()
        keep = {c.step for c in checkpoints[-self.keep_last :]} | {newest}
        if self.keep_best and self.metric:
            scored = [(value, c.step) for c in checkpoints if (value := self._score(c)) is not None]
            scored.sort(reverse=self.higher_is_better)
            keep |= {step for _, step in scored[: self.keep_best]}
        for checkpoint in checkpoints:
            if checkpoint.step not in keep:
                shutil.rmtree(checkpoint.path, ignore_errors=True)

    def _score(self, checkpoint: Checkpoint) -> float | None:
        try:
            value = checkpoint.state().get("metrics", {}).get(self.metric)
        except CheckpointError:
            return None
        return None if value is None else float(value)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # this process is not writing now
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def _write_state(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    files: dict[str, list[int]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sync(path)
        files[str(path.relative_to(folder))] = [path.stat().st_size, _checksum(path)]
    body = {"format": _FORMAT, "core_version": __version__, "step": step, "files": files, "state": state}
    with (folder / _STATE).open("w", encoding="utf-8") as file:
        json.dump(body, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / _STATE
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"Checkpoint {folder} has no readable {_STATE} ({_reason(error)}).") from error
    except ValueError as error:
        raise CheckpointError(f"Checkpoint {folder} has a damaged {_STATE} ({error}).") from error
    if not isinstance(body, dict) or body.get("format") != _FORMAT:
        version = body.get("format") if isinstance(body, dict) else type(body).__name__
        raise CheckpointError(
            f"Checkpoint {folder} has format {version!r}; this version reads format {_FORMAT}. "
            "Use the version that wrote it."
        )
    return body


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, as a sentence, or None."""
    try:
        files = _read_state(folder)["files"]
    except CheckpointError as error:
        return str(error)
    for name, (size, checksum) in files.items():
        path = folder / name
        if not path.is_file():
            return f"Checkpoint {folder} is damaged: {name} is missing."
        if path.stat().st_size != size:
            return f"Checkpoint {folder} is damaged: {name} has {path.stat().st_size} bytes, not {size}."
        if _checksum(path) != checksum:
            return f"Checkpoint {folder} is damaged: the checksum of {name} is wrong."
    return None


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f" ({error.filename})" if error.filename else "")
    return f"{type(error).__name__}: {error}"


def _free(folder: Path) -> str:
    for candidate in (folder, *folder.parents):
        if candidate.exists():
            return f"{shutil.disk_usage(candidate).free / 2**20:.0f} MiB"
    return "an unknown amount"
