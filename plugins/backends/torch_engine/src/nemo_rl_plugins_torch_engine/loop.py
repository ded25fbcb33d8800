"""The engine's thread: steps the scheduler while there is work, and delivers results to event loops."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from nemo_rl_core.errors import DeadlineExceeded, GenerationError
from nemo_rl_core.machine.threads import settle
from nemo_rl_plugins_torch_engine.scheduler import Scheduler
from nemo_rl_plugins_torch_engine.sequence import Sequence

__all__ = ["EngineLoop"]

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 60.0

_Result = tuple[Sequence, Exception | None]


class _Command:
    """A function to run between two steps, and what came of it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.result: Any = None
        self.abandoned = False

    def run(self) -> None:
        """Run it and keep what it raises for the caller."""
        if not self.abandoned:
            try:
                self.result = self.function()
            except BaseException as error:
                self.error = error
        self.done.set()


class EngineLoop:
    """Runs a scheduler in a thread of its own.

    An error in a step reaches every request in flight, and every later one.

    Args:
        scheduler: What is stepped.
        num_threads: Threads of one operator in the engine's thread, whatever other threads use; None is PyTorch's own.
    """

    def __init__(self, scheduler: Scheduler, *, num_threads: int | None = None) -> None:
        self._scheduler = scheduler
        self._num_threads = num_threads
        self._changed = threading.Condition()
        self._incoming: deque[Sequence] = deque()
        self._commands: deque[_Command] = deque()
        self._paused = False
        self._stopping = False
        self._broken: GenerationError | None = None
        self._thread = threading.Thread(target=self._run, name="torch-engine", daemon=True)
        self._ready = threading.Event()
        self._thread.start()
        self._ready.wait(_START_TIMEOUT_S)

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue sequences; those that belong to one prompt best come in one call.

        Raises:
            GenerationError: The engine is shut down or broken.
        """
        with self._changed:
            if self._stopping or self._broken is not None:
                raise self._refusal()
            self._incoming.extend(sequences)
            self._changed.notify()

    def pause(self) -> None:
        """Queue what comes, and start no step, until `resume`."""
        with self._changed:
            self._paused = True

    def resume(self) -> None:
        """Undo `pause`; what was queued enters in its order."""
        with self._changed:
            self._paused = False
            self._changed.notify()

    def cancel(self, sequence: Sequence) -> None:
        """Let a sequence leave at the next step; nobody waits for it any more."""
        sequence.cancelled = True

    def call(self, function: Callable[[], Any], *, what: str, timeout_s: float) -> Any:
        """Run `function` in the engine's thread between two steps and return its result.

        Raises:
            DeadlineExceeded: The engine did not get to it in time.
            GenerationError: The engine is shut down or broken.
            Exception: What `function` raised.
        """
        command = _Command(function)
        with self._changed:
            if self._stopping or self._broken is not None:
                raise self._refusal()
            self._commands.append(command)
            self._changed.notify()
        if not command.done.wait(timeout_s):
            command.abandoned = True
            raise DeadlineExceeded(f"{what}: the torch engine's thread did not finish it in {timeout_s:g} s.")
        if command.error is not None:
            raise command.error
        return command.result

    def stop(self) -> None:
        """End the thread; requests in flight fail. May be called twice."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(_STOP_TIMEOUT_S)
            if self._thread.is_alive():
                logger.warning("The torch engine's thread is still in a step %g s after the stop.", _STOP_TIMEOUT_S)

    # -- the thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._num_threads is not None:
            _set_own_threads(self._num_threads)
        self._ready.set()
        try:
            with torch.inference_mode():
                while self._wait():
                    if not (self._paused or self._scheduler.idle):
                        _deliver(list(self._scheduler.step()))
        except BaseException as error:
            self._broken = GenerationError(
                f"The torch engine failed in a step ({type(error).__name__}: {error}). It no longer accepts requests."
            )
            self._broken.__cause__ = error
            logger.exception("The torch engine failed in a step.")
        self._abort_all()

    def _wait(self) -> bool:
        """Take what was queued; sleep while there is nothing; False when stopping."""
        with self._changed:
            while not (self._stopping or self._commands or self._has_work()):
                self._changed.wait()
            if self._stopping:
                return False
            if not self._paused:
                for sequence in sorted(self._incoming, key=lambda s: s.request.order):
                    self._scheduler.add(sequence)
                self._incoming.clear()
            commands = [self._commands.popleft() for _ in range(len(self._commands))]
        for command in commands:
            command.run()
        return True

    def _has_work(self) -> bool:
        return not self._paused and bool(self._incoming or not self._scheduler.idle)

    def _abort_all(self) -> None:
        with self._changed:
            self._stopping = self._stopping or self._broken is None
            refusal = self._refusal()
            left = [*self._scheduler.drain(), *self._incoming]
            self._incoming.clear()
            commands = list(self._commands)
            self._commands.clear()
        _deliver([(sequence, refusal) for sequence in left])
        for command in commands:
            command.error = refusal
            command.done.set()

    def _refusal(self) -> GenerationError:
        if self._broken is not None:
            error = GenerationError(str(self._broken))
            error.__cause__ = self._broken.__cause__
            return error
        return GenerationError("The torch engine is shut down; make a new one to generate.")


def _set_own_threads(count: int) -> None:
    """Set the number of threads of operators of the calling thread, and of no other.

    `torch.set_num_threads` sets it for the calling thread, and the default of threads that have run no
    operator yet. The default is put back from a thread of its own.
    """
    default = torch.get_num_threads()
    torch.set_num_threads(count)
    restore = threading.Thread(target=torch.set_num_threads, args=(default,), name="torch-engine-threads")
    restore.start()
    restore.join()


def _deliver(results: list[_Result]) -> None:
    """Resolve the futures of finished sequences: one wake-up per event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Result]] = {}
    for sequence, error in results:
        by_loop.setdefault(sequence.loop, []).append((sequence, error))
    for loop, part in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, part)
        except RuntimeError:  # the event loop was closed; nobody waits
            logger.debug("Dropped %d completions: their event loop is closed.", len(part))


def _resolve(results: list[_Result]) -> None:
    for sequence, error in results:
        if not sequence.future.done():
            settle(sequence.future, sequence.completion() if error is None else None, error)
