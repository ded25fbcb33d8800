"""The thread in which rollouts run while the trainer trains."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from nemo_rl_core.errors import DeadlineExceeded, WorkerDied
from nemo_rl_core.machine.garbage import relaxed_collection
from nemo_rl_core.protocols.generation_backend import SamplingParams
from nemo_rl_core.records.message import Task
from nemo_rl_core.records.rollout import RolloutGroup
from nemo_rl_core.rollouts.engine import RolloutEngine

__all__ = ["RolloutRunner"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_WATCH_EVERY_S = 0.5
_CHECK_EVERY_S = 5.0


class RolloutRunner:
    """Owns one event loop in a daemon thread and runs a `RolloutEngine` on it.

    A watch on the loop fails every waiter, naming the line at which it stands, when something blocks the
    loop for longer than `rollouts.environment_timeout_s` (a sync environment that hangs); nobody waits
    for ever.

    Args:
        engine: What runs the groups.
        blocked_timeout_s: Longest time the loop may stand still; None is `environment_timeout_s`.
    """

    def __init__(self, engine: RolloutEngine, *, blocked_timeout_s: float | None = None) -> None:
        self.engine = engine
        self._blocked_timeout_s = blocked_timeout_s or engine.config.environment_timeout_s
        self._lock = threading.Lock()
        self._pending: set[concurrent.futures.Future[Any]] = set()
        self._failure: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._last_beat = time.monotonic()
        self._closing = threading.Event()
        self._check: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._serve, name="nemo-rl-rollouts", daemon=True)
        self._thread.start()
        self._watch = threading.Thread(target=self._watch_loop, name="nemo-rl-rollouts-watch", daemon=True)
        self._watch.start()

    def submit(
        self,
        group_id: int,
        task_id: str,
        task: Task,
        *,
        group_size: int,
        weight_version: int,
        sampling: SamplingParams | None = None,
        on_start: Callable[[int], None] | None = None,
    ) -> concurrent.futures.Future[RolloutGroup]:
        """Start one group; see `RolloutEngine.run_group`.

        Returns:
            A future of the group. Cancelling it cancels the rollouts.

        Raises:
            WorkerDied: The runner was shut down.
            DeadlineExceeded: The loop was found blocked.
        """
        return self.run(
            self.engine.run_group(
                group_id,
                task_id,
                task,
                group_size=group_size,
                weight_version=weight_version,
                sampling=sampling,
                on_start=on_start,
            )
        )

    @contextmanager
    def gathering(self, timeout_s: float = 1.0) -> Iterator[None]:
        """Hold the generation backend while the block submits groups.

        It starts when every episode that may run has asked for its first tokens, so that all of them wait
        before the first is admitted and the batches are formed alike in every run; or after `timeout_s`, if
        environments take longer than that to begin. While other episodes run it is not held: they decide how
        batches are formed.
        """
        if self.engine.num_in_flight:
            yield
            return
        self.engine.generation.pause()
        try:
            yield
            self.run(self.engine.settled(timeout_s)).result()
        finally:
            self.engine.generation.resume()

    def run(self, work: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        """Run any coroutine on the rollout loop, such as a call to the engine under it."""
        with self._lock:
            failure = self._failure or (WorkerDied("The rollout runner was shut down.") if self._closed else None)
            if failure is not None:
                work.close()
                raise failure
            under_way = asyncio.run_coroutine_threadsafe(work, self._loop)
            future: concurrent.futures.Future[_T] = concurrent.futures.Future()
            self._pending.add(future)
        future.add_done_callback(lambda _: under_way.cancel())  # given up, or failed by the watch
        under_way.add_done_callback(lambda done: self._hand_over(done, future))
        return future

    def watch_over(self, check: Callable[[], None]) -> None:
        """Call `check` every few seconds, in a thread of its own; what it raises, everyone who waits for rollouts gets.

        So a trainer that dies is not noticed only when the rollouts that it waits for are done.
        """
        self._check = check

    def cancel_all(self) -> None:
        """Cancel every group under way; their environments are closed, their futures cancelled."""
        with self._lock:
            pending = list(self._pending)
        for future in pending:
            future.cancel()

    def shutdown(self, timeout_s: float = 10.0) -> None:
        """Cancel what runs, end the loop and its thread. May be called twice.

        A thread that does not end within `timeout_s` is left behind (it is a daemon) with a warning.
        """
        self._closing.set()
        self.cancel_all()
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _log.warning("the rollout loop did not end in %g s; it stands at %s", timeout_s, self._position())
        self._watch.join(timeout_s)  # it looks at workers that may be ended next
        self._fail(WorkerDied("The rollout runner was shut down."))

    # -- the loop's thread ------------------------------------------------------------------------

    @property
    def _closed(self) -> bool:
        return self._closing.is_set()

    def _hand_over(self, done: concurrent.futures.Future[_T], future: concurrent.futures.Future[_T]) -> None:
        with self._lock:
            if future not in self._pending:  # the watch has failed it
                return
            self._pending.discard(future)
        if done.cancelled():
            future.cancel()
        if not future.set_running_or_notify_cancel():
            return
        error = done.exception()
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(done.result())

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            with relaxed_collection():
                self._loop.call_soon(self._beat)
                while not self._run_until_stopped():
                    pass
                self._finish_tasks()
        except BaseException as error:
            _log.exception("the rollout loop failed")
            self._fail(WorkerDied(f"The rollout loop failed: {type(error).__name__}: {error}"))
        finally:
            self._loop.close()

    def _run_until_stopped(self) -> bool:
        """Run the loop; False if a task or callback that an environment started itself has thrown it out.

        asyncio lets SystemExit and KeyboardInterrupt of any task end the loop that all episodes share. Whoever awaits
        the task gets its exception; the others go on.
        """
        try:
            self._loop.run_forever()
        except (SystemExit, KeyboardInterrupt) as error:
            _log.warning("A task on the rollout loop raised %r; it should raise an error. The loop goes on.", error)
            return False
        return True

    def _finish_tasks(self) -> None:
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())

    def _beat(self) -> None:
        self._last_beat = time.monotonic()
        self._loop.call_later(_WATCH_EVERY_S, self._beat)

    # -- the watch ----------------------------------------------------------------------------------

    def _watch_loop(self) -> None:
        every = min(_WATCH_EVERY_S, self._blocked_timeout_s / 2)
        checked = time.monotonic()
        while not self._closing.wait(every):
            if self._check is not None and time.monotonic() - checked > _CHECK_EVERY_S:
                checked = time.monotonic()
                try:
                    self._check()
                except Exception as error:  # handed to everyone who waits
                    self._fail(error)
            if not self._thread.is_alive():
                self._fail(WorkerDied("The rollout loop ended unexpectedly."))
                return
            if time.monotonic() - self._last_beat > self._blocked_timeout_s + _WATCH_EVERY_S:
                self._fail(
                    DeadlineExceeded(
                        f"The rollout loop has stood still for {self._blocked_timeout_s:g} s at "
                        f"{self._position()}. Methods of an environment must not block: make them async, or hand "
                        "the work to context.run_in_pool."
                    )
                )
                return

    def _position(self) -> str:
        """Where the loop's thread stands: the innermost frame outside the standard library."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        if frame is None:
            return "an unknown place"
        stack = traceback.extract_stack(frame)
        own = [f for f in stack if "asyncio" not in f.filename and "threading.py" not in f.filename]
        where = (own or stack)[-1]
        return f"{where.filename}:{where.lineno} in {where.name}"

    def _fail(self, error: BaseException) -> None:
        """Hand the error to everyone who waits, and to whoever asks later."""
        with self._lock:
            if self._failure is None and not isinstance(error, WorkerDied):
                self._failure = error
            pending, self._pending = list(self._pending), set()
        for future in pending:
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                future.set_exception(error)
