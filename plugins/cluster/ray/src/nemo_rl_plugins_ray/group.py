"""A group of workers, each in a Ray actor."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, TaskCancelledError

from nemo_rl_core.errors import DeadlineExceeded, WorkerDied
from nemo_rl_core.infra.workers.axes import dispatch
from nemo_rl_core.infra.workers.remote import raised_by
from nemo_rl_core.machine.deadline import Deadline
from nemo_rl_plugins_ray.members import Member, kill
from nemo_rl_plugins_ray.wire import Packet, decode, encode

__all__ = ["RayWorkerGroup"]

_log = logging.getLogger(__name__)
_SHUTDOWN_S = 10.0
_INLINE_BYTES = 64 * 1024

Answers = dict[int, tuple[str, Any]]


class RayWorkerGroup:
    """Running actors of one role. Made by the launcher.

    After a worker died, hung or left the others waiting, the whole group is ended: what remains of a collective
    cannot go on.

    Args:
        role: Name of the role.
        members: Its actors, by rank.
        failure_grace_s: When one worker raises, how long the others may take to answer.
        call_timeout_s: Deadline of a call that sets none.
    """

    def __init__(self, role: str, members: list[Member], *, failure_grace_s: float, call_timeout_s: float) -> None:
        self.role = role
        self.members = members
        self.size = len(members)
        self.failure_grace_s = failure_grace_s
        self.call_timeout_s = call_timeout_s
        self._ended: str | None = None

    @property
    def local(self) -> Any:
        """None: the workers live in other processes."""
        return None

    @property
    def is_running(self) -> bool:
        """Whether it has not been ended."""
        return self._ended is None

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [member.pid for member in self.members]

    # -- calls ----------------------------------------------------------------------------------

    def call(self, method: str, /, *args: Any, timeout_s: float | None = None, **kwargs: Any) -> list[Any]:
        """Call `method` on every worker with the same arguments, which are stored once; results in rank order.

        Raises:
            DeadlineExceeded: Names the ranks that did not answer in `timeout_s`.
            WorkerDied: Names the rank, its node, how it ended and the tail of its standard error.
            Exception: What a worker raised, with its rank in the message.
        """
        self._check_not_ended()
        packet = self._put((args, kwargs))
        return self.collect(method, {m.rank: m.actor.call.remote(method, packet) for m in self.members}, timeout_s)

    def call_each(
        self, method: str, arguments: Sequence[tuple[Any, ...]], /, *, timeout_s: float | None = None
    ) -> list[Any]:
        """Call `method` on worker r with the positional arguments `arguments[r]`; raises as `call`.

        Ranks that are given the same tuple (the peers of one data-parallel shard) read it from one place in the object
        store: it is pickled and stored once.
        """
        if len(arguments) != self.size:
            raise ValueError(f"{method}: {len(arguments)} tuples of arguments for {self.size} {self.role} workers.")
        self._check_not_ended()
        stored: dict[int, Any] = {}
        for args in arguments:
            if id(args) not in stored:
                stored[id(args)] = self._put((args, {}))
        refs = {m.rank: m.actor.call.remote(method, stored[id(arguments[m.rank])]) for m in self.members}
        return self.collect(method, refs, timeout_s)

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
        """Call `method` sharded over some axes, replicated over the others; one result for each shard; as `call`.

        Peers read their shard from one place in the object store, and everyone what is the same object in every
        shard (a loss): that is pickled and stored once.
        """
        dispatched = dispatch(axes, over, num_ranks=self.size, num_shards=len(shards), what=f"{self.role} {method}")
        self._check_not_ended()
        shared = {i: column[0] for i, column in enumerate(zip(*shards, strict=True)) if _is_one(column)}
        stored = self._put(shared) if shared else None
        own = [self._put((tuple(a for i, a in enumerate(args) if i not in shared), {})) for args in shards]
        refs = {}
        for member, shard in zip(self.members, dispatched.shards, strict=True):
            actor = member.actor
            send = actor.call if member.rank in dispatched.heads else actor.run
            refs[member.rank] = send.remote(method, own[shard], stored)
        results = self.collect(method, refs, timeout_s)
        return [results[rank] for rank in dispatched.heads]

    def iterate(self, method: str, /, *args: Any, timeout_s: float | None = None) -> Iterator[Any]:
        """Run a generator method on every worker; yield what rank 0 yields, one item at a time.

        The next items are fetched while the caller works on the last. The deadline holds for all of it, the caller's
        own time left out. A caller that stops early still lets the workers run their generators to the end. Raises
        as `call`.
        """
        self._check_not_ended()
        packet = self._put((args, {}))
        pull = self.members[0].actor.pull
        others = {m.rank: m.actor.drain.remote(method, packet) for m in self.members[1:]}
        head = pull.remote(method, packet)
        answered: Answers = {}
        left = timeout_s
        try:
            last = False
            while not last:
                started = time.monotonic()
                items, last = self._head(method, head, others, answered, left)
                left = None if left is None else left - (time.monotonic() - started)
                if not last:
                    head = pull.remote(None, None)
                for item in items:
                    yield decode(item)
            head = None
            self.collect(method, others, left, answered=answered)
        except GeneratorExit:
            if head is not None and self._ended is None:
                rest = {0: self.members[0].actor.finish.remote(), **others}
                self.collect(method, rest, timeout_s, answered=answered)
            raise

    def check_alive(self) -> None:
        """Raise `WorkerDied` if a worker has died while nobody called it; returns at once.

        Each actor has a ping under way, which it answers when it has nothing else to do, and which Ray fails when the
        actor or its node is gone: the answer is looked at by a later call.
        """
        self._check_not_ended()
        asked = [member.ping for member in self.members if member.ping is not None]
        answered = ray.wait(asked, num_returns=len(asked), timeout=0)[0] if asked else []
        for member in self.members:
            if member.ping in answered:
                try:
                    ray.get(member.ping)
                except RayError as error:
                    raise self._died(member.rank, "between two calls", error) from None
                member.ping = None
            if member.ping is None:
                member.ping = member.actor.ping.remote()

    def shutdown(self) -> None:
        """Call `shutdown` on the workers and end their actors; does nothing the second time."""
        if self._ended is not None or not ray.is_initialized():
            return
        try:
            self.collect("shutdown", {m.rank: m.actor.stop.remote() for m in self.members}, _SHUTDOWN_S)
        except Exception as error:  # the processes are ended all the same
            _log.warning("Shutting down the %s workers: %s", self.role, error)
        self.end("it was shut down")

    # -- sending, receiving, ending -------------------------------------------------------------

    def _check_not_ended(self) -> None:
        """Raise if the group has been ended.

        Raises:
            WorkerDied: With the reason.
        """
        if self._ended is not None:
            raise WorkerDied(f"The {self.role} workers are gone: {self._ended}. Start the run again to go on.")

    def _put(self, value: Any) -> Any:
        """What to pass to actors for a value: a packet, or a reference to one that is stored once."""
        packet = encode(value)
        return packet if packet.num_bytes <= _INLINE_BYTES else ray.put(packet)

    def collect(
        self, method: str, refs: Mapping[int, Any], timeout_s: float | None, *, answered: Answers | None = None
    ) -> list[Any]:
        """Wait for the answers of `refs` (by rank); raise the first error among them."""
        found = self._gather(method, set(refs), refs, dict(answered or {}), timeout_s)
        for rank in sorted(refs):
            kind, value = found[rank]
            if kind == "error":
                raise raised_by(self.role, rank, value)
        return [found[rank][1] for rank in sorted(refs)]

    def _head(
        self, method: str, ref: Any, others: Mapping[int, Any], answered: Answers, timeout_s: float | None
    ) -> Any:
        """Rank 0's answer, while the other ranks work too: what they answer goes into `answered`."""
        waiting = {0: ref, **{rank: other for rank, other in others.items() if rank not in answered}}
        answered.pop(0, None)
        found = self._gather(method, {0}, waiting, answered, timeout_s)
        if any(kind == "error" for kind, _ in found.values()):
            self.collect(method, {0: ref, **others}, timeout_s, answered=found)  # raises it
        return found.pop(0)[1]

    def end(self, reason: str) -> None:
        """End every actor, at once for those that hang."""
        if self._ended is None:
            self._ended = reason
            kill(self.members)

    def _died(self, rank: int, when: str, error: BaseException) -> WorkerDied:
        """The error of a worker whose actor is gone; ends the group."""
        member = self.members[rank]
        ending = member.ending(error)
        message = (
            f"The {self.role} worker of rank {rank} on {member.host} {ending} {when}. Its log is "
            f"{member.log}; the end of it:\n{member.tail()}"
        )
        self.end(f"rank {rank} on {member.host} {ending} {when}")
        return WorkerDied(message)

    # -- waiting --------------------------------------------------------------------------------

    def _gather(
        self, method: str, wanted: set[int], refs: Mapping[int, Any], found: Answers, timeout_s: float | None
    ) -> Answers:
        """Answers of `wanted` into `found`, and of others of `refs` that come earlier.

        Once a worker has raised, the others get the grace time.
        """
        limit = self.call_timeout_s if timeout_s is None else timeout_s
        deadline = Deadline(limit)
        rank_of = {ref: rank for rank, ref in refs.items() if rank not in found}
        failed = any(kind == "error" for kind, _ in found.values())
        if failed:
            deadline.shorten(self.failure_grace_s)
        while missing := wanted & set(rank_of.values()):
            ready, _ = ray.wait(list(rank_of), num_returns=1, timeout=deadline.remaining())
            if not ready:
                raise self._overdue(method, sorted(missing), found, limit)
            for ref in ready:
                rank = rank_of.pop(ref)
                found[rank] = self._take(rank, method, ref)
                if found[rank][0] == "error" and not failed:
                    failed = True
                    deadline.shorten(self.failure_grace_s)
        return found

    def _take(self, rank: int, method: str, ref: Any) -> tuple[str, Any]:
        try:
            packet: Packet = ray.get(ref)
        except TaskCancelledError:
            return "error", (RuntimeError(f"{method} was cancelled."), f"{method} was cancelled.", "")
        except RayError as error:
            if method == "shutdown":
                return "result", None
            if method == "start":
                return "result", error  # the launcher knows better what it means
            raise self._died(rank, f"during {method}", error) from None
        kind, value = decode(packet)
        return kind, value

    def _overdue(self, method: str, ranks: list[int], found: Answers, limit_s: float) -> BaseException:
        """The deadline, or the grace time after an error, has passed: the group cannot go on."""
        names = ", ".join(map(str, ranks))
        for rank, (kind, value) in sorted(found.items()):
            if kind == "error":
                self.end(f"rank {rank} raised in {method} while ranks {names} waited for it")
                return raised_by(self.role, rank, value)
        late = [self.members[rank] for rank in ranks]
        tails = "\n".join(f"{member.place} ({member.log}):\n{member.tail()}" for member in late[:4])
        nodes = ", ".join(dict.fromkeys(member.host for member in late))
        self.end(f"ranks {names} did not answer {method}")
        return DeadlineExceeded(
            f"{method} on the {self.role} workers passed its deadline of {limit_s:g} s; no answer from rank(s) {names} "
            f"of {self.size} (on {nodes}). The group was ended. The end of their logs:\n{tails}"
        )


def _is_one(column: Sequence[Any]) -> bool:
    """Whether all are the same object."""
    return all(value is column[0] for value in column)
