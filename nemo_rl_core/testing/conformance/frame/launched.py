"""The worker that the launcher's kit starts. It imports nothing heavy, so that starting it is quick."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_rl_core.protocols.launcher import WorkerContext

__all__ = ["LaunchedWorker"]


class LaunchedWorker:
    """Answers, raises, dies and hangs on demand."""

    def setup(self, config: object, context: WorkerContext) -> None:
        """Keep the context; refuse on rank 1 if the configuration is "refuse"."""
        self.config = config
        self.context = context
        if config == "refuse" and context.rank == 1:
            raise LookupError("no such thing as this configuration")

    def get_context(self) -> WorkerContext:
        """Return the context that `setup` got."""
        return self.context

    def pid(self) -> int:
        """Return the process id."""
        return os.getpid()

    def variable(self, name: str) -> str | None:
        """Return an environment variable."""
        return os.environ.get(name)

    def combine(self, first: Any, *, plus: Any = 0) -> tuple[int, Any]:
        """Return the rank and the sum of `first` and `plus`, such as of two numbers, texts or tensors."""
        return self.context.rank, first + plus

    def count(self, number: int) -> Iterator[tuple[int, int]]:
        """Yield (rank, 0), (rank, 1), and so on."""
        for i in range(number):
            yield self.context.rank, i

    def fail(self, rank: int) -> str:
        """Raise on one rank."""
        if self.context.rank == rank:
            raise LookupError("cannot find the thing")
        return "fine"

    def leave(self, rank: int, status: int) -> None:
        """End the process of one rank with this status after some last words; a negative status is a signal."""
        if self.context.rank == rank:
            sys.stderr.write("these are my last words\n")
            sys.stderr.flush()
            if status < 0:
                os.kill(os.getpid(), signal.Signals(-status))
            os._exit(status)

    def leave_soon(self, rank: int, status: int) -> None:
        """End the process as `leave` does, a moment after this call has returned."""
        threading.Timer(0.2, self.leave, (rank, status)).start()

    def only_first(self, value: object) -> object:
        """Return `value` on the first rank, and something that cannot be pickled on the others."""
        return value if self.context.rank == 0 else (_ for _ in ())

    def hang(self, rank: int, seconds: float) -> str:
        """Answer late on one rank."""
        if self.context.rank == rank:
            time.sleep(seconds)
        return "late"

    def shutdown(self) -> None:
        """Leave a mark, if the configuration names a folder for it."""
        if isinstance(self.config, str) and Path(self.config).is_dir():
            (Path(self.config) / f"rank{self.context.rank}").touch()
