"""A group of workers, each in a Ray actor."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import RayError, TaskCancelledError

from nemo_rl_core.infra.workers.axes import dispatch
from nemo_rl_core.infra.workers.group import Answers, RemoteGroup
from nemo_rl_plugins_ray.members import Member, kill
from nemo_rl_plugins_ray.wire import Packet, decode, encode

__all__ = ["RayWorkerGroup"]

_log = logging.getLogger(__name__)
_SHUTDOWN_S = 10.0
_INLINE_BYTES = 64 * 1024


class RayWorkerGroup(RemoteGroup["ObjectRef[Any]"]):
    """Running actors of one role. Made by the launcher.

    Args:
        role: Name of the role.
        members: Its actors, by rank.
        failure_grace_s: When one worker raises, how long the others may take to answer.
        call_timeout_s: Deadline of a call that sets none.
    """

    def __init__(self, role: str, members: list[Member], *, failure_grace_s: float, call_timeout_s: float) -> None:
        super().__init__(role, size=len(members), failure_grace_s=failure_grace_s, call_timeout_s=call_timeout_s)
        self.members = members

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [member.pid for member in self.members]

    # -- calls ----------------------------------------------------------------------------------

    def call(self, method: str, /, *args: object, timeout_s: float | None = None, **kwargs: object) -> list[Any]:
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
        self._check_one_each(method, arguments)
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

    def iterate(self, method: str, /, *args: object, timeout_s: float | None = None) -> Iterator[Any]:
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

    def _put(self, value: object) -> Packet | ObjectRef[Any]:
        """What to pass to actors for a value: a packet, or a reference to one that is stored once."""
        packet = encode(value)
        return packet if packet.num_bytes <= _INLINE_BYTES else ray.put(packet)

    def _head(
        self,
        method: str,
        ref: ObjectRef[Any],
        others: Mapping[int, ObjectRef[Any]],
        answered: Answers,
        timeout_s: float | None,
    ) -> Any:
        """Rank 0's answer, while the other ranks work too: what they answer goes into `answered`."""
        waiting = {0: ref, **{rank: other for rank, other in others.items() if rank not in answered}}
        answered.pop(0, None)
        found = self._gather(method, {0}, waiting, answered, timeout_s)
        if any(kind == "error" for kind, _ in found.values()):
            self.collect(method, {0: ref, **others}, timeout_s, answered=found)  # raises it
        return found.pop(0)[1]

    def _end_workers(self) -> None:
        kill(self.members)

    # -- waiting --------------------------------------------------------------------------------

    def _answers(
        self, method: str, handles: Mapping[int, ObjectRef[Any]], found: Answers, timeout_s: float
    ) -> Answers | None:
        rank_of = {handle: rank for rank, handle in handles.items()}
        ready, _ = ray.wait(list(rank_of), num_returns=1, timeout=timeout_s)
        return {rank_of[ref]: self._take(rank_of[ref], method, ref) for ref in ready} or None

    def _take(self, rank: int, method: str, ref: ObjectRef[Any]) -> tuple[str, Any]:
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

    # -- errors ---------------------------------------------------------------------------------

    def _place(self, rank: int) -> str:
        return self.members[rank].place

    def _how_it_ended(self, rank: int, error: BaseException | None) -> str:
        return self.members[rank].ending(error)

    def _log(self, rank: int) -> tuple[Path, str]:
        return self.members[rank].log, self.members[rank].tail()


def _is_one(column: Sequence[Any]) -> bool:
    """Whether all are the same object."""
    return all(value is column[0] for value in column)
