"""The driver's view of a refit: work in the trainer's workers and in the engines at the same time.

What the two sides do is a function each; it runs where the worker is. Nothing but the functions' small arguments and
results passes through the driver.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from attrs import frozen

from nemo_rl_core.errors import DeadlineExceeded
from nemo_rl_core.infra.engines.workers import EngineWorkers
from nemo_rl_core.machine.deadline import Deadline
from nemo_rl_core.machine.place import Place, place_of
from nemo_rl_core.machine.threads import in_thread
from nemo_rl_core.protocols.launcher import WorkerGroup
from nemo_rl_plugins_weight_syncs.hub import PeerGaveUp, RefitDeadline

__all__ = ["RefitPeers"]

_GRACE_S = 2.0
"""After the deadline, for the sides to say themselves whom they waited for; and after one said that the other gave
up, for the other to say why."""

Work = Callable[..., Any]
_Futures = dict[concurrent.futures.Future[Any], str]


@frozen
class RefitPeers:
    """A trainer and the engines it refits.

    Args:
        group: The trainer's workers.
        engine: One engine of this process, or `EngineWorkers`.
        deadline: Of the refit.
    """

    group: WorkerGroup
    engine: Any
    deadline: RefitDeadline

    @property
    def engine_names(self) -> list[str]:
        """Names of the engines in messages."""
        if isinstance(self.engine, EngineWorkers):
            return [f"the engine {link.name}" for link in self.engine.links]
        return ["the engine"]

    def places(self) -> tuple[dict[int, Place], list[Place]]:
        """Places of the trainer's ranks that get whole tensors (rank 0 always does), and of the engines."""
        if isinstance(self.engine, EngineWorkers):
            self.engine.wait_alive(self.deadline.remaining())
            engines = [link.served.place for link in self.engine.links]
        else:
            engines = [place_of(self.engine)]
        places = self.trainer(_find, ())
        return {rank: place for rank, place in enumerate(places) if place is not None}, engines

    def trainer(self, work: Work, args: tuple[Any, ...]) -> list[Any]:
        """`work(backend, rank, *args)` on every rank; results by rank."""
        futures = self._start_trainer(work, args)
        (result,) = self._wait(futures)
        return list(result)

    def engines(self, work: Work, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        """`work(engine, *args[i])` in engine i; results by engine."""
        return self._wait(self._start_engines(work, args))

    def both(
        self, send: Work, send_args: tuple[Any, ...], receive: Work, receive_args: Sequence[tuple[Any, ...]]
    ) -> tuple[list[Any], list[Any]]:
        """Both at once.

        Raises:
            DeadlineExceeded: Names the side that was waited for.
            Exception: What one side raised; if the other only followed it, what came first.
        """
        futures = {**self._start_trainer(send, send_args), **self._start_engines(receive, receive_args)}
        sent, *received = self._wait(futures)
        return list(sent), received

    # -- starting ----------------------------------------------------------------------------------

    def _start_trainer(self, work: Work, args: tuple[Any, ...]) -> _Futures:
        group, timeout_s = self.group, self.deadline.remaining() + 2 * _GRACE_S
        if group.local is not None:
            return {in_thread(lambda: [work(group.local, 0, *args)], name="nemo-rl-refit"): "the trainer"}
        calls = [(work, rank, *args) for rank in range(group.size)]
        calling = partial(group.call_each, "apply", calls, timeout_s=timeout_s)
        return {in_thread(calling, name="nemo-rl-refit"): "the trainer"}

    def _start_engines(self, work: Work, args: Sequence[tuple[Any, ...]]) -> _Futures:
        if isinstance(self.engine, EngineWorkers):
            return dict(zip(self.engine.submit_each(work, args), self.engine_names, strict=True))
        (only,) = args
        return {in_thread(lambda: work(self.engine, *only), name="nemo-rl-refit"): "the engine"}

    # -- waiting -----------------------------------------------------------------------------------

    def _wait(self, futures: _Futures) -> list[Any]:
        done = _first_failure(futures, self.deadline.remaining() + _GRACE_S)
        errors = _errors(done)
        if errors and all(isinstance(error, PeerGaveUp) for error in errors):
            done = _all_done(futures, _GRACE_S)
            errors = _errors(done)
        if errors:
            raise min(errors, key=_rank_of_error)
        waiting = [who for future, who in futures.items() if not future.done()]
        if waiting:
            raise self.deadline.exceeded(" and ".join(waiting))
        return [future.result() for future in futures]


def _errors(futures: Iterable[concurrent.futures.Future[Any]]) -> list[BaseException]:
    return [error for future in futures if (error := future.exception()) is not None]


def _rank_of_error(error: BaseException | None) -> int:
    """A failure says more than a deadline that it made the other side miss, and that more than "it gave up"."""
    return 2 if isinstance(error, PeerGaveUp) else 1 if isinstance(error, DeadlineExceeded) else 0


def _first_failure(futures: _Futures, timeout_s: float) -> set[concurrent.futures.Future[Any]]:
    return concurrent.futures.wait(futures, timeout_s, concurrent.futures.FIRST_EXCEPTION).done


def _all_done(futures: _Futures, timeout_s: float) -> set[concurrent.futures.Future[Any]]:
    """What is done when nothing but "it gave up" is known no longer, at `timeout_s` at the latest."""
    deadline = Deadline(timeout_s)
    while True:
        done, pending = concurrent.futures.wait(futures, 0)
        told = any(f.exception() is not None and not isinstance(f.exception(), PeerGaveUp) for f in done)
        if told or not pending or deadline.expired:
            return done
        concurrent.futures.wait(pending, deadline.remaining(), concurrent.futures.FIRST_COMPLETED)


def _find(backend: object, rank: int) -> Place | None:
    everywhere = "exports_on_every_rank" in getattr(backend, "capabilities", ())
    return place_of(backend) if rank == 0 or everywhere else None
