"""Simulated engines behind the contract of a generation backend."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from nemo_rl_core.errors import GenerationError, InvariantViolation
from nemo_rl_core.planning.simulation.spec import EngineSpec, SimulatedCluster
from nemo_rl_core.protocols.generation_backend import GenerationRequest
from nemo_rl_core.records.completion import Completion

__all__ = ["SimulatedGeneration"]

_SLOWER = 20


class _Sequence:
    """A request at an engine."""

    __slots__ = ("done", "finish", "future", "length", "order", "version")

    def __init__(self, order: int, length: int, future: asyncio.Future[None]) -> None:
        self.order = order
        self.length = length
        self.future = future
        self.version = -1
        """Of the weights when its first token was sampled."""
        self.finish = 0.0
        """`_Engine.work` at which it ends."""
        self.done = False

    def __lt__(self, other: _Sequence) -> bool:
        return (self.finish, self.order) < (other.finish, other.order)


class _Engine:
    """One engine: its active sequences advance at one common rate (processor sharing)."""

    def __init__(self, spec: EngineSpec, owner: SimulatedGeneration) -> None:
        self.spec = spec
        self.owner = owner
        self.work = 0.0
        """Tokens that a sequence active from the beginning would have by now."""
        self.active: list[_Sequence] = []
        self.num_active = 0
        self.waiting: deque[_Sequence] = deque()
        self.num_tokens = 0.0
        self.held = False
        """Its devices are another's for now."""
        self._rate = 0.0
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def load(self) -> int:
        return self.num_active + len(self.waiting)

    def add(self, sequence: _Sequence) -> None:
        self._catch_up()
        self.waiting.append(sequence)
        self._admit()

    def leave(self, sequence: _Sequence) -> None:
        """Remove a sequence whose caller gave up."""
        self._catch_up()
        if sequence.version < 0:
            self.waiting.remove(sequence)
        elif not sequence.done:
            sequence.done = True
            self.num_active -= 1
        self._admit()

    def hold(self, on: bool) -> None:
        self._catch_up()
        self.held = on
        self._plan()

    def crash(self) -> None:
        self._catch_up()
        gone = [*(s for s in self.active if not s.done), *self.waiting]
        self.active, self.num_active = [], 0
        self.waiting.clear()
        for sequence in gone:
            sequence.done = True
            if not sequence.future.done():
                sequence.future.set_exception(GenerationError("simulated: the engine died"))
        self._admit()

    def _catch_up(self) -> None:
        now = self.owner.loop.time()
        self.work += self._rate * (now - self._since)
        self.num_tokens += self._rate * (now - self._since) * self.num_active
        self._since = now

    def _admit(self) -> None:
        while self.waiting and self.num_active < self.spec.max_batch:
            sequence = self.waiting.popleft()
            sequence.version = self.owner.version
            sequence.finish = self.work + sequence.length
            heapq.heappush(self.active, sequence)
            self.num_active += 1
        self._plan()

    def _plan(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self.active and self.active[0].done:
            heapq.heappop(self.active)
        if self.held or not self.active:
            self._rate = 0.0
            return
        self._rate = min(self.spec.sequence_tokens_per_s, self.spec.tokens_per_s / self.num_active)
        left = max(self.active[0].finish - self.work, 0.0) / self._rate
        self._timer = self.owner.loop.call_later(left, self._finish)

    def _finish(self) -> None:
        self._timer = None
        self._catch_up()
        if self.active:
            self.work = max(self.work, self.active[0].finish)  # rounding must not leave it a step behind
        while self.active and (self.active[0].done or self.active[0].finish <= self.work):
            sequence = heapq.heappop(self.active)
            if not sequence.done:
                sequence.done = True
                self.num_active -= 1
                if not sequence.future.done():
                    sequence.future.set_result(None)
        self._admit()


class SimulatedGeneration:
    """A `GenerationBackend` of many simulated engines.

    A completion has two tokens: how long the response is, and the true version of the weights that sampled its first
    token, which an observer compares with what the run believes.

    Args:
        cluster: What is simulated.
        loop: The virtual loop.
        rng: What goes wrong is drawn from it.
    """

    config_class: ClassVar[type] = dict
    capabilities: ClassVar[frozenset[str]] = frozenset({"in_flight_updates"})

    def __init__(self, cluster: SimulatedCluster, loop: asyncio.AbstractEventLoop, rng: random.Random) -> None:
        self.cluster = cluster
        self.loop = loop
        self.rng = rng
        self.version = 0
        self.num_in_flight = 0
        self.engines = [_Engine(cluster.engine, self) for _ in range(cluster.engine.num_engines)]
        self._turn = itertools.count()
        every = cluster.faults.engine_crash_every_s / len(self.engines)
        if every < float("inf"):
            self._crash_later(every)

    async def generate(self, request: GenerationRequest) -> Completion:
        """Wait as long as the engines take for a response of the length that the request's seed gives.

        Raises:
            GenerationError: A fault that was drawn.
        """
        cluster, faults = self.cluster, self.cluster.faults
        self.num_in_flight += 1
        if self.num_in_flight > cluster.rollouts.max_in_flight:
            raise InvariantViolation(f"{self.num_in_flight} requests are in flight, above rollouts.max_in_flight.")
        try:
            if cluster.engine.request_s:
                await asyncio.sleep(cluster.engine.request_s)
            kind = self.rng.random()
            if kind < faults.request_error:
                raise GenerationError("simulated: the request failed")
            if kind < faults.request_error + faults.request_stuck:
                await self.loop.create_future()
            length = cluster.lengths.draw(random.Random(request.sampling.seed))
            if self.rng.random() < faults.request_slow:
                length *= _SLOWER
            sequence = await self._decode(length)
            return Completion(
                request_id=request.request_id,
                token_ids=[length, sequence.version],
                logprobs=[-1.0, -1.0],
                finish_reason="stop",
                weight_version=sequence.version,
                last_weight_version=self.version,
                text="",
            )
        finally:
            self.num_in_flight -= 1

    async def _decode(self, length: int) -> _Sequence:
        engine = min(self.engines, key=lambda e: e.load) if len(self.engines) <= 16 else self._two_choices()
        sequence = _Sequence(next(self._turn), length, self.loop.create_future())
        engine.add(sequence)
        try:
            await sequence.future
        except asyncio.CancelledError:
            if not sequence.done:
                engine.leave(sequence)
            raise
        return sequence

    def _two_choices(self) -> _Engine:
        """The less loaded of two: nearly as even as asking all of hundreds of engines."""
        first, second = self.rng.choice(self.engines), self.rng.choice(self.engines)
        return first if first.load <= second.load else second

    def update_weights(self, version: int, tensors: Iterable[tuple[str, Any]], *, share: bool = False) -> None:
        """Set the weight version of what is sampled from now on.

        Raises:
            InvariantViolation: Requests are in flight, and these engines do not take weights under them.
        """
        if self.num_in_flight and not self.cluster.engine.in_flight_updates:
            raise InvariantViolation(f"Weights {version} came while {self.num_in_flight} requests were in flight.")
        self.version = version

    @contextmanager
    def giving_way(self) -> Iterator[None]:
        """The trainer computes: engines that share its devices stand still."""
        if not self.cluster.shared_devices:
            yield
            return
        for engine in self.engines:
            engine.hold(True)
        try:
            yield
        finally:
            for engine in self.engines:
                engine.hold(False)

    def pause(self) -> None:
        """Do nothing: batches form without a pause."""

    def resume(self) -> None:
        """Do nothing, as `pause`."""

    def fingerprint(self) -> str:
        """Return the weight version, which stands for the weights."""
        return str(self.version)

    def metrics(self) -> Mapping[str, float]:
        """Report nothing: the simulation reads the engines' tokens by `num_tokens`."""
        return {}

    def num_tokens(self) -> float:
        """Number of tokens sampled so far by all engines."""
        for engine in self.engines:
            engine._catch_up()
        return sum(engine.num_tokens for engine in self.engines)

    def shutdown(self) -> None:
        """Release nothing."""

    def _crash_later(self, every: float) -> None:
        def crash() -> None:
            self.rng.choice(self.engines).crash()
            self._crash_later(every)

        self.loop.call_later(self.rng.expovariate(1 / every), crash)
