"""Generators whose rows depend on Python's hash seed, run in a process that has a fixed one.

They iterate over sets of strings, so their rows differ from one process to the next, and a resumed run would
read other data than it did before. As a program (`python -m`), this module is that process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from multiprocessing.connection import Connection, Pipe
from typing import Any

from nemo_rl_core.errors import DataError, DeadlineExceeded

__all__ = ["HASH_DEPENDENT", "SeededGenerator", "needs_fixed_hashes"]

HASH_DEPENDENT = frozenset(
    {"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"}
)
"""Found by comparing the rows of every generator under two hash seeds."""

_ROW_TIMEOUT_S = 120.0


def needs_fixed_hashes(task: str) -> bool:
    """Whether a task's rows must be made in another process to be the same every time."""
    return task in HASH_DEPENDENT and os.environ.get("PYTHONHASHSEED") != "0"


class SeededGenerator:
    """Rows of one generator by index, from a process with hash seed 0; it is started by the first row.

    Args:
        task: Name of the generator.
        config: Its configuration object.
    """

    def __init__(self, task: str, config: Any) -> None:
        self._task = task
        self._config = config
        self._lock = threading.Lock()
        self._pipe: Connection[Any, Any] | None = None

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row.

        Raises:
            DataError: The generator raised, or its process died.
            DeadlineExceeded: The row took more than two minutes.
        """
        with self._lock:
            pipe = self._pipe or self._start()
            try:
                pipe.send(index)
                if not pipe.poll(_ROW_TIMEOUT_S):
                    self._pipe = None
                    raise DeadlineExceeded(
                        f"The generator of reasoning-gym task {self._task!r} did not make row {index} in "
                        f"{_ROW_TIMEOUT_S:.0f} s. Give it easier options."
                    )
                answer = pipe.recv()
            except (EOFError, OSError) as e:
                self._pipe = None
                raise DataError(f"The process that generates reasoning-gym task {self._task!r} died: {e!r}.") from e
        if isinstance(answer, str):
            raise DataError(f"reasoning-gym task {self._task!r} cannot make row {index}: {answer}")
        row: dict[str, Any] = answer
        return row

    def _start(self) -> Connection[Any, Any]:
        ours, theirs = Pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is for the run, not for this process
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        theirs.close()
        weakref.finalize(self, _end, process, ours)
        ours.send((self._task, self._config))
        self._pipe = ours
        return ours


def _end(process: subprocess.Popen[bytes], pipe: Connection[Any, Any]) -> None:
    pipe.close()
    process.kill()
    process.wait()


def _serve(pipe: Connection[Any, Any]) -> None:
    """Answer indices with rows, or with the text of an error, until the other side is gone."""
    from reasoning_gym import factory

    try:
        task, config = pipe.recv()
        rows = factory.DATASETS[task][0](config=config)
        while True:
            index = pipe.recv()
            try:
                pipe.send(rows[index])
            except Exception as e:
                pipe.send(f"{type(e).__name__}: {e}")
    except (EOFError, OSError):
        return


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
