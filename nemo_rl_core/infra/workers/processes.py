"""A group of worker processes on this machine: one per device, each with a connection to the driver."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from attrs import evolve

from nemo_rl_core.errors import DeadlineExceeded
from nemo_rl_core.infra.workers import child as _worker
from nemo_rl_core.infra.workers.axes import dispatch
from nemo_rl_core.infra.workers.forking import start_context
from nemo_rl_core.infra.workers.group import Answers, RemoteGroup
from nemo_rl_core.infra.workers.remote import (
    expected_plugins,
    log_folder,
    log_tail,
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


class ProcessGroup(RemoteGroup[Connection]):
    """Running worker processes of one role. Make it with `ProcessGroup.start`.

    Calls from several threads take turns.
    """

    def __init__(self, role: str, *, size: int, failure_grace_s: float, call_timeout_s: float) -> None:
        super().__init__(role, size=size, failure_grace_s=failure_grace_s, call_timeout_s=call_timeout_s)
        self._processes: list[BaseProcess] = []
        self._connections: dict[int, Connection] = {}
        self._logs: list[Path] = []
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
            group.collect("setup", group._connections, start_timeout_s)
        except BaseException:
            group.end("its start failed")
            raise
        return group

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid or 0 for process in self._processes]

    def call(self, method: str, /, *args: object, timeout_s: float | None = None, **kwargs: object) -> list[Any]:
        """Call `method` on every worker with the same arguments; results in rank order.

        Raises:
            DeadlineExceeded: Names the ranks that did not answer in `timeout_s`.
            WorkerDied: Names the rank, its exit status and the tail of its standard error.
            Exception: What a worker raised, with its rank in the message.
        """
        with self._taking_turns(method, timeout_s):
            self._tell([("call", method, args, kwargs)] * self.size)
            return self.collect(method, self._connections, timeout_s)

    def call_each(
        self, method: str, arguments: Sequence[tuple[Any, ...]], /, *, timeout_s: float | None = None
    ) -> list[Any]:
        """Call `method` on worker r with the positional arguments `arguments[r]`; raises as `call`."""
        self._check_one_each(method, arguments)
        with self._taking_turns(method, timeout_s):
            self._tell([("call", method, args, {}) for args in arguments])
            return self.collect(method, self._connections, timeout_s)

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
            results = self.collect(method, self._connections, timeout_s)
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
                found = self._gather(method, {0}, {0: self._connections[0]}, {}, left)
                spent += time.monotonic() - started
                kind, value = found[0]
                if kind != "item":
                    break
                yield value
                del value, found  # free the memory of the item before the next
                self._reply("next")
            finished = True
            rest = None if timeout_s is None else timeout_s - spent
            self.collect(method, self._connections, rest, answered={0: (kind, value)})
        except GeneratorExit:
            if not finished and self._ended is None:
                self._reply("enough")
                self.collect(method, self._connections, timeout_s)
            raise

    def check_alive(self) -> None:
        """Raise `WorkerDied` if a worker has died while nobody called it; returns at once."""
        if not self._turn.acquire(blocking=False):
            return  # a call is under way, which notices it
        try:
            self._check_not_ended()
            ended = wait([process.sentinel for process in self._processes], 0)
            for rank, process in enumerate(self._processes):
                if process.sentinel in ended:
                    raise self._died(rank, "between two calls")
        finally:
            self._turn.release()

    def shutdown(self) -> None:
        """Call `shutdown` on the workers and end their processes; does nothing the second time."""
        if self._ended is not None:
            return
        try:
            self._tell([("stop",)] * self.size)
            self.collect("shutdown", self._connections, _SHUTDOWN_S)
        except Exception as error:  # the processes are ended all the same
            _log.warning("Shutting down the %s workers: %s", self.role, error)
        else:
            for process in self._processes:  # let each leave by itself and release what it holds
                process.join(_SHUTDOWN_S)
        self.end("it was shut down")

    # -- starting and ending --------------------------------------------------------------------

    def _spawn(self, spec: WorkerSpec, context: WorkerContext, folder: Path) -> None:
        import cloudpickle

        variables = worker_environment(spec, context)
        start = start_context(context.device, variables, threads_given=context.num_threads is not None)
        here, there = start.Pipe()
        log_path = folder / f"{spec.label}-rank{context.rank}.log"
        payload = cloudpickle.dumps((spec.factory, spec.config, context))
        process: BaseProcess = start.Process(  # type: ignore[attr-defined]  # typeshed has it in the subclasses
            target=_worker.run,
            args=(there, payload, dict(os.environ), variables, str(log_path), expected_plugins(spec)),
            name=f"nemo-rl-{spec.label}-{context.rank}",
            daemon=True,
        )
        with starting():
            process.start()
        there.close()
        self._processes.append(process)
        self._connections[context.rank] = here
        self._logs.append(log_path)

    def _verify(self, timeout_s: float) -> None:
        """Compare every worker's plugins with those of this process; one that is stuck does not hold back the table."""
        left = dict(self._connections)
        answered: Answers = {}
        deadline = Deadline(timeout_s)
        while left:
            ready = wait(list(left.values()), deadline.remaining())
            for rank in [rank for rank, connection in left.items() if connection in ready]:
                self._gather("start", {rank}, {rank: left.pop(rank)}, answered, timeout_s)
                self._raise_first(answered)
            differ = any(differences for _, differences in answered.values())
            if not ready and differ:
                break
            if not ready:
                raise self._overdue("start", sorted(left), answered, timeout_s)
            if differ:
                deadline.shorten(_VERIFY_GRACE_S)
        check_nodes([difference for rank in sorted(answered) for difference in answered[rank][1]])

    def _end_workers(self) -> None:
        """End every process, and whatever these had started."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join()
            _end_children(process.pid or 0)
        for connection in self._connections.values():
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

    def _tell(self, messages: Sequence[Any]) -> None:
        self._check_not_ended()
        for (rank, connection), message in zip(self._connections.items(), messages, strict=True):
            try:
                send(connection, message)
            except OSError as error:
                raise self._died(rank, f"during {message[1] if len(message) > 1 else 'shutdown'}") from error

    def _reply(self, word: str) -> None:
        with contextlib.suppress(OSError):  # a dead worker is noticed by the wait that follows
            send(self._connections[0], word)

    def collect(
        self,
        method: str,
        handles: Mapping[int, Connection],
        timeout_s: float | None,
        *,
        answered: Answers | None = None,
    ) -> list[Any]:
        """As `RemoteGroup.collect`; items of an iteration that its caller has left are passed over."""
        found = self._gather(method, set(handles), handles, dict(answered or {}), timeout_s)
        while stray := {rank: handles[rank] for rank, (kind, _) in found.items() if kind == "item"}:
            rest = {rank: answer for rank, answer in found.items() if rank not in stray}
            found = self._gather(method, stray, stray, rest, timeout_s)
        return super().collect(method, handles, timeout_s, answered=found)

    def _answers(
        self, method: str, handles: Mapping[int, Connection], found: Answers, timeout_s: float
    ) -> Answers | None:
        gone = {rank for rank, (kind, _) in found.items() if kind == "error" or method == "shutdown"}
        # One that has ended after it said more than was asked for yet is judged by what it said.
        gone |= {rank for rank, connection in self._connections.items() if rank not in handles and connection.poll()}
        sentinels = {process.sentinel: rank for rank, process in enumerate(self._processes) if rank not in gone}
        ready = wait([*handles.values(), *sentinels], timeout_s)
        if not ready:
            return None
        answers = {rank: self._take(rank, method) for rank, connection in handles.items() if connection in ready}
        for rank in (sentinels[sentinel] for sentinel in ready if isinstance(sentinel, int)):
            waited_for = rank in handles and rank not in answers
            if waited_for and handles[rank].poll():
                continue  # its last message is still to be read
            if method != "shutdown":
                if {**found, **answers}.get(rank, ("", None))[0] != "error":
                    raise self._died(rank, f"during {method}")
            elif waited_for:
                answers[rank] = ("result", None)
        return answers

    def _take(self, rank: int, method: str) -> tuple[str, Any]:
        try:
            kind, value = receive(self._connections[rank])
        except (EOFError, OSError) as error:
            raise self._died(rank, f"during {method}") from error
        return kind, value

    # -- errors ---------------------------------------------------------------------------------

    def _place(self, rank: int) -> str:
        return f"rank {rank}"

    def _how_it_ended(self, rank: int, error: BaseException | None) -> str:
        self._processes[rank].join(5.0)
        return status_text(self._processes[rank].exitcode)

    def _log(self, rank: int) -> tuple[Path, str]:
        return self._logs[rank], log_tail(self._logs[rank])


def _end_children(pid: int) -> None:
    """End what a worker that is gone had started: the rest of its session."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        with contextlib.suppress(OSError):  # nothing is left
            os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass  # its id is another process's by now: then nothing was left either
