"""A group of workers in other processes: gathers their answers, and ends when one of them dies or is overdue."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from nemo_rl_core.errors import DeadlineExceeded, WorkerDied
from nemo_rl_core.infra.workers.remote import raised_by
from nemo_rl_core.machine.deadline import Deadline

__all__ = ["Answers", "RemoteGroup"]

H = TypeVar("H")
"""What an answer is waited for with, such as a connection."""

Answers = dict[int, tuple[str, Any]]
"""By rank: "result" and a value, "error" and an `ErrorReport`, or another word of the group's own."""

_TAILS = 4
"""Workers whose logs a message shows."""


class RemoteGroup(ABC, Generic[H]):
    """Running workers of one role, each in a process of its own.

    After a worker died, hung or left the others waiting, the whole group is ended: what remains of a collective
    cannot go on.

    Args:
        role: Name of the role.
        size: Number of workers.
        failure_grace_s: When one worker raises, how long the others may take to answer.
        call_timeout_s: Deadline of a call that sets none.
    """

    def __init__(self, role: str, *, size: int, failure_grace_s: float, call_timeout_s: float) -> None:
        self.role = role
        self.size = size
        self.failure_grace_s = failure_grace_s
        self.call_timeout_s = call_timeout_s
        self._ended: str | None = None

    @property
    def local(self) -> None:
        """Always None: the workers live in other processes."""
        return

    @property
    def is_running(self) -> bool:
        """Whether it has not been ended."""
        return self._ended is None

    def end(self, reason: str) -> None:
        """End every worker, at once for those that hang."""
        if self._ended is None:
            self._ended = reason
            self._end_workers()

    def collect(
        self, method: str, handles: Mapping[int, H], timeout_s: float | None, *, answered: Answers | None = None
    ) -> list[Any]:
        """Wait for the answers of `handles`, which are by rank; raise the first error among all.

        Raises:
            DeadlineExceeded: Names the ranks that did not answer in time.
            WorkerDied: Names the rank, how it ended and the tail of its log.
            Exception: What a worker raised, with its rank in the message.
        """
        found = self._gather(method, set(handles), handles, dict(answered or {}), timeout_s)
        self._raise_first(found)
        return [found[rank][1] for rank in sorted(handles)]

    # -- what a kind of group does in its own way -----------------------------------------------

    @abstractmethod
    def _answers(self, method: str, handles: Mapping[int, H], found: Answers, timeout_s: float) -> Answers | None:
        """Wait for answers of any of `handles`.

        Args:
            method: What was called.
            handles: Of the workers that have not answered.
            found: Answers so far.
            timeout_s: How long to wait.

        Returns:
            The answers that have come, perhaps none; None when the time is over.

        Raises:
            WorkerDied: Made by `_died`.
        """

    @abstractmethod
    def _end_workers(self) -> None:
        """End every process."""

    @abstractmethod
    def _place(self, rank: int) -> str:
        """A worker as messages call it, such as "rank 1"."""

    @abstractmethod
    def _how_it_ended(self, rank: int, error: BaseException | None) -> str:
        """How the process of a worker that died has ended, as a verb: "exited with status 3"."""

    @abstractmethod
    def _log(self, rank: int) -> tuple[Path, str]:
        """Where the log of a worker is, and how it ends."""

    # -- waiting --------------------------------------------------------------------------------

    def _gather(
        self,
        method: str,
        wanted: Collection[int],
        handles: Mapping[int, H],
        found: Answers,
        timeout_s: float | None,
    ) -> Answers:
        """Answers of `wanted` into `found`, and of others of `handles` that come earlier.

        Once a worker has raised, the others get the grace time.
        """
        limit = self.call_timeout_s if timeout_s is None else timeout_s
        deadline = Deadline(limit)
        left = {rank: handle for rank, handle in handles.items() if rank not in found}
        failed = False
        while True:
            if not failed and any(kind == "error" for kind, _ in found.values()):
                failed = True
                deadline.shorten(self.failure_grace_s)
            missing = sorted(set(wanted) & set(left))
            if not missing:
                return found
            answers = self._answers(method, left, found, deadline.remaining())
            if answers is None:
                raise self._overdue(method, missing, found, limit)
            found.update(answers)
            left = {rank: handle for rank, handle in left.items() if rank not in answers}

    # -- errors ---------------------------------------------------------------------------------

    def _check_not_ended(self) -> None:
        if self._ended is not None:
            raise WorkerDied(f"The {self.role} workers are gone: {self._ended}. Start the run again to go on.")

    def _check_one_each(self, method: str, arguments: Sequence[object]) -> None:
        if len(arguments) != self.size:
            raise ValueError(f"{method}: {len(arguments)} tuples of arguments for {self.size} {self.role} workers.")

    def _raise_first(self, found: Answers) -> None:
        for rank in sorted(found):
            kind, value = found[rank]
            if kind == "error":
                raise raised_by(self.role, rank, value)

    def _died(self, rank: int, when: str, error: BaseException | None = None) -> WorkerDied:
        """End the group, since a worker is gone; return the error to raise."""
        place, ending = self._place(rank), self._how_it_ended(rank, error)
        log, tail = self._log(rank)
        message = f"The {self.role} worker of {place} {ending} {when}. Its log is {log}; the end of it:\n{tail}"
        self.end(f"{place} {ending} {when}")
        return WorkerDied(message)

    def _overdue(self, method: str, ranks: Sequence[int], found: Answers, limit_s: float) -> BaseException:
        """End the group, since the deadline or the grace time after an error has passed; return the error to raise."""
        names = ", ".join(map(str, ranks))
        for rank, (kind, value) in sorted(found.items()):
            if kind == "error":
                self.end(f"rank {rank} raised in {method} while ranks {names} waited for it")
                return raised_by(self.role, rank, value)
        places = {rank: self._place(rank) for rank in ranks}
        logs = {rank: self._log(rank) for rank in ranks[:_TAILS]}
        tails = "\n".join(f"{places[rank]} ({log}):\n{tail}" for rank, (log, tail) in logs.items())
        nodes = ", ".join(dict.fromkeys(place.partition(" on ")[2] for place in places.values()))
        self.end(f"ranks {names} did not answer {method}")
        return DeadlineExceeded(
            f"{method} on the {self.role} workers passed its deadline of {limit_s:g} s; no answer from rank(s) {names} "
            f"of {self.size}{f' (on {nodes})' if nodes else ''}. The group was ended. The end of their logs:\n{tails}"
        )
