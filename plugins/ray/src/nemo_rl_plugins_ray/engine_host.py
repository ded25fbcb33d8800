"""The actor's side of a generation engine: requests come in batches, completions leave in batches.

Calls to the engine run on an event loop of its own thread; `collect` waits in a concurrency group of its own, so that
requests and control messages pass it by.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from typing import Any

import ray

from nemo_rl_core.errors import DeadlineExceeded
from nemo_rl_core.infra.remote import report_error
from nemo_rl_plugins_ray.host import WorkerHost, _answer
from nemo_rl_plugins_ray.wire import Packet, decode

__all__ = ["EngineHost"]

_POLL_S = 5.0


class EngineHost(WorkerHost):
    """One generation backend in its actor."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="engine-calls", daemon=True).start()
        self._tasks: dict[int, asyncio.Task[Any]] = {}
        self._done: list[tuple[int, str, Any]] = []
        self._changed = threading.Condition()
        self._refit: _Refit | None = None

    # -- requests -------------------------------------------------------------------------------

    def submit(self, packet: Packet) -> Packet:
        """Hand requests to the engine, (ticket, request) each; returns when the engine has them all."""
        return _answer(lambda: asyncio.run_coroutine_threadsafe(self._begin(decode(packet)), self._loop).result())

    async def _begin(self, requests: list[tuple[int, Any]]) -> None:
        for ticket, request in requests:
            self._tasks[ticket] = asyncio.create_task(self._generate(ticket, request))
        await asyncio.sleep(0)  # each has called the engine now

    async def _generate(self, ticket: int, request: Any) -> None:
        from nemo_rl_core.registry import PluginCall

        try:
            with PluginCall(self._kind, self._worker, "generate"):
                found: tuple[int, str, Any] = (ticket, "result", await self._worker.generate(request))
        except asyncio.CancelledError:
            return
        except Exception as error:  # the caller's
            found = (ticket, "error", report_error(error))
        finally:
            self._tasks.pop(ticket, None)
        with self._changed:
            self._done.append(found)
            self._changed.notify()

    def cancel(self, tickets: list[int]) -> None:
        """Take requests back."""

        def run() -> None:
            for ticket in tickets:
                task = self._tasks.get(ticket)
                if task is not None:
                    task.cancel()

        self._loop.call_soon_threadsafe(run)

    @ray.method(concurrency_group="mail")  # type: ignore[untyped-decorator]
    def collect(self) -> Packet:
        """Completions that are ready, (ticket, kind, value) each; waits a while for the first."""

        def run() -> list[tuple[int, str, Any]]:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._done), _POLL_S)
                done, self._done = self._done, []
            return done

        return _answer(run)

    # -- weights --------------------------------------------------------------------------------

    def begin_refit(self, version: int, timeout_s: float) -> Packet:
        """Start `update_weights` on tensors that `load` brings."""

        def run() -> None:
            if self._refit is not None:
                self._refit.abort()
            self._refit = _Refit(self._worker, version, timeout_s)

        return _answer(run)

    def load(self, packet: Packet) -> Packet:
        """Give the refit a list of (name, tensor); returns when the last one was taken."""

        def run() -> None:
            assert self._refit is not None
            self._refit.put(decode(packet, copy=False))

        return _answer(run)

    def end_refit(self) -> Packet:
        """There are no more tensors: wait for the engine."""

        def run() -> None:
            refit, self._refit = self._refit, None
            assert refit is not None
            refit.finish()

        return _answer(run)

    def abort_refit(self) -> Packet:
        """The trainer failed: let the engine's call end with an error."""

        def run() -> None:
            refit, self._refit = self._refit, None
            if refit is not None:
                refit.abort()

        return _answer(run)


class _Refit:
    """`update_weights` in a thread, fed chunk by chunk."""

    def __init__(self, worker: Any, version: int, timeout_s: float) -> None:
        self._chunks: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._failure: BaseException | None = None
        self._version = version
        self._timeout_s = timeout_s

        def run() -> None:
            try:
                worker.update_weights(version, self._tensors(), share=False)
            except BaseException as error:  # raised by `put` or `finish`
                self._failure = error

        self._thread = threading.Thread(target=run, name=f"refit-{version}", daemon=True)
        self._thread.start()

    def _tensors(self) -> Iterator[tuple[str, Any]]:
        while True:
            chunk = self._chunks.get(timeout=self._timeout_s)
            if chunk is None:
                return
            if isinstance(chunk, BaseException):
                raise chunk
            yield from chunk

    def put(self, chunk: Any) -> None:
        """Hand a chunk over; raises what the engine raised."""
        left = self._timeout_s
        while True:
            if not self._thread.is_alive():
                if self._failure is not None:
                    raise self._failure
                return  # the engine has all it wants
            try:
                self._chunks.put(chunk, timeout=0.2)
                return
            except queue.Full:
                left -= 0.2
                if left < 0:
                    raise DeadlineExceeded(
                        f"The engine took no tensor for {self._timeout_s:g} s (weight version {self._version})."
                    ) from None

    def finish(self) -> None:
        """End the sequence of tensors and wait for the engine."""
        self.put(None)
        self._thread.join(self._timeout_s)
        if self._thread.is_alive():
            raise DeadlineExceeded(
                f"update_weights to version {self._version} did not return in {self._timeout_s:g} s after its last "
                "tensor."
            )
        if self._failure is not None:
            raise self._failure

    def abort(self) -> None:
        """Break the engine's call off."""
        try:
            self._chunks.put(RuntimeError("the refit was broken off"), timeout=1.0)
        except queue.Full:
            return
