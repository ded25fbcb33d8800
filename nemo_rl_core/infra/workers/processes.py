"""A group of worker processes on this machine: one per device, each with a connection to the driver."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from attrs import evolve

from nemo_rl_core.errors import DeadlineExceeded, WorkerDied
from nemo_rl_core.infra.workers import child as _worker
from nemo_rl_core.infra.workers.axes import dispatch
from nemo_rl_core.infra.workers.remote import (
    expected_plugins,
    log_folder,
    log_tail,
    raised_by,
    status_text,
    worker_environment,
)
from nemo_rl_core.infra.workers.wire import receive, send
from nemo_rl_core.machine.deadline import Deadline
from nemo_rl_core.machine.place import free_port
from nemo_rl_core.machine.starting import starting
from nemo_rl_core.protocols.launcher import WorkerContext, WorkerSpec
from nemo_rl_core.registry import check_nodes

__all__ = ["ProcessGroup"]

_log = logging.getLogger(__name__)
_SHUTDOWN_S = 10.0
_VERIFY_GRACE_S = 5.0
"""Once a worker has told that its plugins differ, how long the others may take to tell whether theirs do."""


class ProcessGroup:
    """Running worker processes of one role. Make it with `ProcessGroup.start`.

    After a worker died, hung or left the others waiting, the whole group is ended: what remains of a collective
    cannot go on. Calls from several threads take turns.
    """

    def __init__(self, role: str, *, size: int, failure_grace_s: float, call_timeout_s: float) -> None:
        self.role = role
        self.size = size
        self.call_timeout_s = call_timeout_s
        self.failure_grace_s = failure_grace_s
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._logs: list[Path] = []
        self._ended: str | None = None
        self._turn = threading.Lock()
        self._turn_of = ""

    @classmethod
    def start(
        cls,
        spec: WorkerSpec,
        contexts: Sequence[WorkerContext],
        *,
        start_timeout_s: float,
        failure_grace_s: float,
        call_timeout_s: float = 3600.0,
    ) -> ProcessGroup:
        """Start one process per context, compare its plugins with this process's, and run `setup` in each.

        Raises:
            PluginIncompatible: Workers lack a plugin or have another version; the message holds a table.
            WorkerDied: A process ended during its start.
            DeadlineExceeded: A worker was not ready in time.
            Exception: What a worker's `setup` raised, with its rank.
        """
        group = cls(spec.label, size=len(contexts), failure_grace_s=failure_grace_s, call_timeout_s=call_timeout_s)
        port = free_port()
        folder = log_folder(spec)
        try:
            for context in contexts:
                group._spawn(spec, evolve(context, master_port=port), folder)
            group._verify(start_timeout_s)
            group._collect("setup", start_timeout_s)
        except BaseException:
            group._end("its start failed")
            raise
        return group

    @property
    def local(self) -> None:
        """Always None: the workers live in other processes."""
        return

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [int(p.pid) for p in self._processes]

    def call(self, method: str, /, *args: object, timeout_s: float | None = None, **kwargs: object) -> list[Any]:
        """Call `method` on every worker with the same arguments; results in rank order.

        Raises:
            DeadlineExceeded: Names the ranks that did not answer in `timeout_s`.
            WorkerDied: Names the rank, its exit status and the tail of its standard error.
            Exception: What a worker raised, with its rank in the message.
        """
        with self._taking_turns(method, timeout_s):
            self._tell([("call", method, args, kwargs)] * self.size)
            return self._collect(method, timeout_s)

    def call_each(
        self, method: str, arguments: Sequence[tuple[Any, ...]], /, *, timeout_s: float | None = None
    ) -> list[Any]:
        """Call `method` on worker r with the positional arguments `arguments[r]`; raises as `call`."""
        if len(arguments) != self.size:
            raise ValueError(f"{method}: {len(arguments)} tuples of arguments for {self.size} {self.role} workers.")
        with self._taking_turns(method, timeout_s):
            self._tell([("call", method, args, {}) for args in arguments])
            return self._collect(method, timeout_s)

    def call_sharded(
        self,
        method: str,
        shards: Sequence[tuple[Any, ...]],
        /,
        *,
        axes: Mapping[str, int],
        over: str | Sequence[str] = "dp",
        timeout_s: float | None = None,
    ) -> list[Any]:
        """Call `method` sharded over some axes, replicated over the others; one result for each shard; as `call`."""
        found = dispatch(axes, over, num_ranks=self.size, num_shards=len(shards), what=f"{self.role} {method}")
        kinds = ["call" if rank in found.heads else "run" for rank in range(self.size)]
        with self._taking_turns(method, timeout_s):
            self._tell([(k, method, shards[s], {}) for k, s in zip(kinds, found.shards, strict=True)])
            results = self._collect(method, timeout_s)
        return [results[rank] for rank in found.heads]

    def iterate(self, method: str, /, *args: object, timeout_s: float | None = None) -> Iterator[Any]:
        """Run a generator method on every worker; yield what rank 0 yields, one item at a time.

        The deadline holds for all of it, the caller's own time between items left out. A caller that stops early
        still lets the workers run their generators to the end. Raises as `call`.
        """
        with self._taking_turns(method, timeout_s):
            yield from self._iterate(method, args, timeout_s)

    def _iterate(self, method: str, args: tuple[object, ...], timeout_s: float | None) -> Iterator[Any]:
        self._tell([("iterate", method, args, rank == 0) for rank in range(self.size)])
        spent = 0.0
        finished = False
        try:
            while True:
                started = time.monotonic()
                left = None if timeout_s is None else timeout_s - spent
                found = self._gather(method, {0: self._connections[0]}, left)
                spent += time.monotonic() - started
                kind, value = found[0]
                if kind != "item":
                    break
                yield value
                del value, found  # free the memory of the item before the next
                self._reply("next")
            finished = True
            self._collect(method, None if timeout_s is None else timeout_s - spent, answered={0: (kind, value)})
        except GeneratorExit:
            if not finished and self._ended is None:
                self._reply("enough")
                self._collect(method, timeout_s)
            raise

    def check_alive(self) -> None:
        """Raise `WorkerDied` if a worker has died while nobody called it; returns at once."""
        if not self._turn.acquire(blocking=False):
            return  # a call is under way, which notices it
        try:
            self._check_not_ended()
            sentinels = {process.sentinel: rank for rank, process in enumerate(self._processes)}
            for sentinel in wait(list(sentinels), 0):
                raise self._died(sentinels[sentinel], "between two calls")
        finally:
            self._turn.release()

    def shutdown(self) -> None:
        """Call `shutdown` on the workers and end their processes; does nothing the second time."""
        if self._ended is not None:
            return
        try:
            self._tell([("stop",)] * self.size)
            self._collect("shutdown", _SHUTDOWN_S)
        except Exception as error:  # the processes are ended all the same
            _log.warning("Shutting down the %s workers: %s", self.role, error)
        else:
            for process in self._processes:  # let each leave by itself and release what it holds
                process.join(_SHUTDOWN_S)
        self._end("it was shut down")

    # -- starting and ending --------------------------------------------------------------------

    def _spawn(self, spec: WorkerSpec, context: WorkerContext, folder: Path) -> None:
        import cloudpickle

        spawn = multiprocessing.get_context("spawn")
        here, there = spawn.Pipe()
        log_path = folder / f"{spec.label}-rank{context.rank}.log"
        payload = cloudpickle.dumps((spec.factory, spec.config, context))
        process = spawn.Process(
            target=_worker.run,
            args=(there, payload, worker_environment(spec, context), str(log_path), expected_plugins(spec)),
            name=f"nemo-rl-{spec.label}-{context.rank}",
            daemon=True,
        )
        with starting():
            process.start()
        there.close()
        self._processes.append(process)
        self._connections.append(here)
        self._logs.append(log_path)

    def _verify(self, timeout_s: float) -> None:
        """Compare every worker's plugins with those of this process; one that is stuck does not hold back the table."""
        left = dict(enumerate(self._connections))
        answered: dict[int, tuple[str, Any]] = {}
        deadline = Deadline(timeout_s)
        while left:
            ready = wait(list(left.values()), deadline.remaining())
            for rank in [rank for rank, connection in left.items() if connection in ready]:
                answered |= self._gather("start", {rank: left.pop(rank)}, timeout_s)
                kind, value = answered[rank]
                if kind == "error":
                    raise raised_by(self.role, rank, value)
            differ = any(differences for _, differences in answered.values())
            if not ready and differ:
                break
            if not ready:
                raise self._overdue("start", sorted(left), answered, timeout_s)
            if differ:
                deadline.shorten(_VERIFY_GRACE_S)
        check_nodes([difference for rank in sorted(answered) for difference in answered[rank][1]])

    def _end(self, reason: str) -> None:
        """End every process, at once for those that hang, and whatever these had started."""
        if self._ended is None:
            self._ended = reason
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join()
            _end_children(process.pid)
        for connection in self._connections:
            connection.close()

    # -- talking --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _taking_turns(self, method: str, timeout_s: float | None) -> Iterator[None]:
        """Wait for calls of other threads: answers to two calls at once would be mixed up."""
        limit = self.call_timeout_s if timeout_s is None else timeout_s
        if not self._turn.acquire(timeout=limit):
            raise DeadlineExceeded(
                f"{method} on the {self.role} workers passed its deadline of {limit:g} s before it could begin: they "
                f"are in {self._turn_of}."
            )
        self._turn_of = method
        try:
            yield
        finally:
            self._turn.release()

    def _check_not_ended(self) -> None:
        if self._ended is not None:
            raise WorkerDied(f"The {self.role} workers are gone: {self._ended}. Start the run again to go on.")

    def _tell(self, messages: Sequence[Any]) -> None:
        self._check_not_ended()
        for rank, (connection, message) in enumerate(zip(self._connections, messages, strict=True)):
            try:
                send(connection, message)
            except OSError as error:
                raise self._died(rank, f"during {message[1] if len(message) > 1 else 'shutdown'}") from error

    def _reply(self, word: str) -> None:
        with contextlib.suppress(OSError):  # a dead worker is noticed by the wait that follows
            send(self._connections[0], word)

    def _collect(
        self, method: str, timeout_s: float | None, *, answered: Mapping[int, tuple[str, Any]] | None = None
    ) -> list[Any]:
        """Wait for every worker's answer; raise the first error among them."""
        known = dict(answered or {})
        waiting = {r: c for r, c in enumerate(self._connections) if r not in known}
        known |= self._gather(method, waiting, timeout_s, failed=known)
        while stray := [rank for rank, (kind, _) in known.items() if kind == "item"]:
            for rank in stray:  # items of an iteration that its caller has left
                known |= self._gather(method, {rank: self._connections[rank]}, timeout_s)
        for rank in range(self.size):
            kind, value = known[rank]
            if kind == "error":
                raise raised_by(self.role, rank, value)
        return [known[rank][1] for rank in range(self.size)]

    def _gather(
        self,
        method: str,
        waiting: Mapping[int, Connection],
        timeout_s: float | None,
        *,
        failed: Mapping[int, tuple[str, Any]] | None = None,
    ) -> dict[int, tuple[str, Any]]:
        """One message from each of `waiting`. Once a worker has raised, the others get the grace time."""
        left = dict(waiting)
        found: dict[int, tuple[str, Any]] = dict(failed or {})
        limit = self.call_timeout_s if timeout_s is None else timeout_s
        deadline = Deadline(limit)
        if any(kind == "error" for kind, _ in found.values()):
            deadline.shorten(self.failure_grace_s)
        while left:
            gone = {r for r, (kind, _) in found.items() if kind == "error" or method == "shutdown"}
            sentinels = {p.sentinel: r for r, p in enumerate(self._processes) if r not in gone}
            ready = wait([*left.values(), *sentinels], deadline.remaining())
            if not ready:
                raise self._overdue(method, sorted(left), found, limit)
            for rank, connection in list(left.items()):
                if connection in ready:
                    found[rank] = self._take(rank, method)
                    del left[rank]
                    if found[rank][0] == "error":
                        deadline.shorten(self.failure_grace_s)
            for rank in (sentinels[s] for s in ready if s in sentinels):
                if rank in left and left[rank].poll():
                    continue  # its last message is still to be read
                if method != "shutdown":
                    if found.get(rank, ("", None))[0] != "error":
                        raise self._died(rank, f"during {method}")
                elif left.pop(rank, None) is not None:
                    found[rank] = ("result", None)
        return found

    def _take(self, rank: int, method: str) -> tuple[str, Any]:
        try:
            kind, value = receive(self._connections[rank])
        except (EOFError, OSError) as error:
            raise self._died(rank, f"during {method}") from error
        return kind, value

    # -- errors ---------------------------------------------------------------------------------

    def _died(self, rank: int, when: str) -> WorkerDied:
        process = self._processes[rank]
        process.join(5.0)
        status = status_text(process.exitcode)
        message = (
            f"The {self.role} worker of rank {rank} {status} {when}. Its log is {self._logs[rank]}; "
            f"the end of it:\n{log_tail(self._logs[rank])}"
        )
        self._end(f"rank {rank} {status} {when}")
        return WorkerDied(message)

    def _overdue(
        self, method: str, ranks: list[int], found: Mapping[int, tuple[str, Any]], timeout_s: float
    ) -> BaseException:
        """End the group, since the deadline or the grace time after an error has passed; return the error to raise."""
        names = ", ".join(map(str, ranks))
        for rank, (kind, value) in sorted(found.items()):
            if kind == "error":
                self._end(f"rank {rank} raised in {method} while ranks {names} waited for it")
                return raised_by(self.role, rank, value)
        tails = "\n".join(f"rank {rank} ({self._logs[rank]}):\n{log_tail(self._logs[rank])}" for rank in ranks[:4])
        self._end(f"ranks {names} did not answer {method}")
        return DeadlineExceeded(
            f"{method} on the {self.role} workers passed its deadline of {timeout_s:g} s; no answer from rank(s) "
            f"{names} of {self.size}. The group was ended. The end of their logs:\n{tails}"
        )


def _end_children(pid: int) -> None:
    """End what a worker that is gone had started: the rest of its session."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        with contextlib.suppress(OSError):  # nothing is left
            os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass  # its id is another process's by now: then nothing was left either
