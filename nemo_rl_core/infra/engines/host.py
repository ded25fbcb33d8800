"""Worker side of an engine process: serves any generation backend over one connection.

The launcher starts an `EngineHost` like every other worker. What it is asked for often (requests, completions,
cancellations) goes over one authenticated connection to the driver, so that thousands of requests are in flight
and come back one by one; the launcher's own calls only start it, look after it and end it.

Messages to the host, in the order in which they take effect:
    ("generate", [(number, request), ...]), ("cancel", [number, ...]), ("pause",), ("resume",),
    ("call", number, cloudpickled (function, args)), ("ping",)
Messages from it:
    ("done", [(number, completion or None, described error or None), ...]), ("answer", number, ok, payload),
    ("pong",)

A ping is answered by the threads of the connection, however long a step of the engine takes. When the engine raises
`WorkerDied` (a process that it had started is gone), this process ends as well: then it is started again, and its
requests are sampled anew, as after any death.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NoReturn

from attrs import frozen

from nemo_rl_core.errors import GenerationError, WorkerDied
from nemo_rl_core.infra.workers.making import make_worker
from nemo_rl_core.infra.workers.remote import ErrorReport, report_error
from nemo_rl_core.machine.arrivals import Address, Arrivals
from nemo_rl_core.machine.place import Place, find_place
from nemo_rl_core.machine.threads import daemon
from nemo_rl_core.registry import PluginCall

if TYPE_CHECKING:
    import torch

    from nemo_rl_core.protocols.generation_backend import GenerationBackend, GenerationRequest
    from nemo_rl_core.protocols.launcher import WorkerContext, WorkerReference
    from nemo_rl_core.records.completion import Completion
    from nemo_rl_core.schema import GenerationConfig

__all__ = ["EngineHost", "HostConfig", "Served"]

_KIND = "generation_backends"
_CALL_THREADS = 4
_LAST_WORDS_S = 5.0
"""How long a process that ends may take to hand over what is done."""


@frozen(kw_only=True)
class HostConfig:
    """Configuration of an engine process."""

    engine: WorkerReference[GenerationBackend] | Callable[[], GenerationBackend]
    """`ComponentRef` of the generation backend."""
    generation: GenerationConfig


@frozen(kw_only=True)
class Served:
    """Facts about a ready engine, for the driver."""

    address: Address
    """Address of its socket."""
    place: Place
    pid: int
    dtype: torch.dtype | None
    """Type of its weights; None if it does not say."""
    capabilities: frozenset[str]


class EngineHost:
    """Runs one generation backend in a worker process and serves it to the driver."""

    kind = _KIND
    """Of the component it stands for."""

    def __init__(self) -> None:
        self.engine: GenerationBackend | None = None
        self._server: _Server | None = None

    def setup(self, config: HostConfig, context: WorkerContext) -> None:
        """Make the engine and set it up."""
        self._context = context
        self.engine = engine = make_worker(config.engine)
        with PluginCall(_KIND, engine, "setup"):
            engine.setup(config.generation, context)

    def serve(self, key: bytes, driver: Place) -> Served:
        """Open the connection.

        Args:
            key: Secret that the driver proves to know (HMAC) before anything it sends is read.
            driver: Where the driver is: on this machine a socket of the file system is opened, else a port.
        """
        if self.engine is None:
            raise RuntimeError("EngineHost.setup() must come before serve().")
        place = find_place(self._context.device)
        self._server = _Server(self.engine, key, place, same_machine=place.machine == driver.machine)
        return Served(
            address=self._server.address,
            place=place,
            pid=os.getpid(),
            dtype=getattr(self.engine, "dtype", None),
            capabilities=frozenset(self.engine.capabilities),
        )

    def ping(self) -> int:
        """Process id: whether this process still answers."""
        return os.getpid()

    def shutdown(self) -> None:
        """End the connection and the engine."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        if self.engine is not None:
            with PluginCall(_KIND, self.engine, "shutdown"):
                self.engine.shutdown()


class _Server:
    """One connection to the driver, and the event loop in which the engine's `generate` runs."""

    def __init__(self, engine: GenerationBackend, key: bytes, place: Place, *, same_machine: bool) -> None:
        self.engine = engine
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._out: SimpleQueue[Any] = SimpleQueue()
        self._writer: threading.Thread | None = None
        self._calls = ThreadPoolExecutor(_CALL_THREADS, thread_name_prefix="nemo-rl-engine-call")
        where = None if same_machine else place.address_between_machines()
        self._arrivals = Arrivals(key, address=where, name="nemo-rl-engine-arrivals")
        self.address = self._arrivals.address
        self._loop = asyncio.new_event_loop()
        daemon(self._run_loop, name="nemo-rl-engine-requests")
        daemon(self._accept, name="nemo-rl-engine-connection")

    def close(self) -> None:
        """Cancel what is in flight and stop the threads."""
        self._loop.call_soon_threadsafe(self._cancel, list(self._tasks))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._calls.shutdown(wait=False, cancel_futures=True)
        self._arrivals.close()

    # -- the connection ----------------------------------------------------------------------------

    def _accept(self) -> None:
        while (connection := self._arrivals.next()) is not None:
            self._writer = daemon(self._write, connection, name="nemo-rl-engine-out")
            self._read(connection)

    def _read(self, connection: Connection) -> None:
        handlers: dict[str, Callable[..., None]] = {
            "generate": self._start,
            "cancel": self._cancel,
            "pause": self._pause,
            "resume": self._resume,
        }
        while True:
            try:
                kind, *rest = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):
                self._loop.call_soon_threadsafe(self._cancel, list(self._tasks))
                self._out.put(None)
                return
            if kind == "ping":
                self._out.put(("pong",))
            elif kind == "call":
                self._calls.submit(self._call, *rest)
            else:
                self._loop.call_soon_threadsafe(handlers[kind], *rest)

    def _write(self, connection: Connection) -> None:
        """Send the outgoing messages; completions that are ready at the same time go in one message."""
        while True:
            messages = [self._out.get()]
            while not self._out.empty():
                messages.append(self._out.get())
            done = [message[1] for message in messages if message is not None and message[0] == "done"]
            others = [message for message in messages if message is not None and message[0] != "done"]
            try:
                if done:
                    connection.send_bytes(pickle.dumps(("done", done)))
                for message in others:
                    connection.send_bytes(pickle.dumps(message))
            except OSError:
                return
            if None in messages:
                return

    # -- requests ----------------------------------------------------------------------------------

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _start(self, requests: Sequence[tuple[int, GenerationRequest]]) -> None:
        for number, request in requests:
            self._tasks[number] = self._loop.create_task(self._generate(number, request))

    async def _generate(self, number: int, request: GenerationRequest) -> None:
        completion: Completion | None = None
        error: ErrorReport | None = None
        try:
            with PluginCall(_KIND, self.engine, "generate"):
                completion = await self.engine.generate(request)
        except asyncio.CancelledError:
            if number not in self._tasks:  # the driver has given it up
                return
            error = report_error(GenerationError(f"Request {request.request_id!r}: the engine cancelled it."))
        except WorkerDied as died:
            self._end(died)
        except BaseException as raised:  # reported to the driver, which raises it
            error = report_error(raised)
        self._tasks.pop(number, None)
        self._out.put(("done", (number, completion, error)))

    def _cancel(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            task = self._tasks.pop(number, None)
            if task is not None:
                task.cancel()

    def _pause(self) -> None:
        self.engine.pause()

    def _resume(self) -> None:
        """Resume once the earlier requests have reached the engine, which takes each of them some turns of the loop."""
        self._loop.create_task(self._resume_soon())

    async def _resume_soon(self) -> None:
        for _ in range(4):
            await asyncio.sleep(0)
        self.engine.resume()

    # -- calls -------------------------------------------------------------------------------------

    def _call(self, number: int, payload: bytes) -> None:
        import cloudpickle

        try:
            function, args = pickle.loads(payload)
            answer = cloudpickle.dumps(function(self.engine, *args))
        except WorkerDied as died:
            self._end(died)
        except BaseException as error:  # reported to the driver, which raises it
            self._out.put(("answer", number, False, cloudpickle.dumps(report_error(error))))
        else:
            self._out.put(("answer", number, True, answer))

    # -- its end -----------------------------------------------------------------------------------

    def _end(self, died: WorkerDied) -> NoReturn:
        """End this process, since a process of its engine is gone; its end answers everyone who waits."""
        traceback.print_exception(died)  # into the log, of which the driver tells the end
        sys.stderr.flush()
        self._out.put(None)
        if self._writer is not None:
            self._writer.join(_LAST_WORDS_S)
        os._exit(1)
