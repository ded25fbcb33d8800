"""The actor's side: holds one worker, takes calls, and answers with packets.

Importing this module must not import torch: plugins are verified and thread counts are set first.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray

from nemo_rl_core.infra.workers.remote import adopt_environment, redirect_output, report_error, trace_calls
from nemo_rl_core.machine.place import ADDRESS_VARIABLE, free_port, gloo_interface
from nemo_rl_plugins_ray.wire import Packet, decode, encode

__all__ = ["THREADS", "WorkerHost", "exit_record"]

THREADS = "OMP_NUM_THREADS"
_ITEM_BYTES = 16 * 2**20
"""Items of an iteration travel together up to this size."""
_MAX_ITEMS = 64


class WorkerHost:
    """One worker in its actor. Every method answers ("result", value) or ("error", report) in a packet."""

    def __init__(self) -> None:
        self._worker: Any = None
        self._kind = ""
        self._items: Iterator[Any] | None = None

    # -- starting -------------------------------------------------------------------------------

    def start(self, environment: dict[str, str], log_path: str, manifest: str) -> Packet:
        """Adopt the environment and compare plugins; imports neither torch nor a plugin."""

        def begin() -> dict[str, Any]:
            from nemo_rl_core.registry import get_registry, node_differences

            log = _writable(log_path)
            redirect_output(str(log))
            _record_exits(exit_record(log))
            if THREADS not in environment:
                os.environ.pop(THREADS, None)  # Ray sets it to 1 where it counts no CPU for an actor
            adopt_environment(environment)
            if interface := gloo_interface(environment.get(ADDRESS_VARIABLE, "")):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            return {
                "differences": node_differences(json.loads(manifest), get_registry()),
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "node": ray.get_runtime_context().get_node_id(),
                "log": str(log),
                "port": free_port(""),
            }

        return _answer(begin)

    def setup(self, payload: bytes) -> Packet:
        """Make the worker and run its `setup`."""

        def begin() -> None:
            import cloudpickle

            from nemo_rl_core.infra.workers.making import kind_of, make_worker
            from nemo_rl_core.registry import PluginCall

            factory, config, context = cloudpickle.loads(payload)
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = context.master_addr, str(context.master_port)
            trace_calls(context)
            warnings.filterwarnings("ignore", message="The given buffer is not writable")  # the object store's
            if context.num_threads is not None:
                import torch

                torch.set_num_threads(context.num_threads)
            self._kind = kind_of(factory)
            self._worker = make_worker(factory)
            with PluginCall(self._kind, self._worker, "setup"):
                self._worker.setup(config, context)

        return _answer(begin)

    # -- calls ----------------------------------------------------------------------------------

    def ping(self) -> None:
        """Nothing: that it is answered says that this actor lives."""

    def call(self, method: str, packet: Packet, shared: Packet | None = None) -> Packet:
        """Call a method of the worker; `shared` are further arguments by their position."""
        return _answer(lambda: self._call(method, packet, shared))

    def run(self, method: str, packet: Packet, shared: Packet | None = None) -> Packet:
        """As `call`, with a result that nobody wants: None."""

        def run() -> None:
            self._call(method, packet, shared)

        return _answer(run)

    def _call(self, method: str, packet: Packet, shared: Packet | None = None) -> Any:
        from nemo_rl_core.registry import PluginCall

        args, kwargs = decode(packet)
        if shared is not None:
            args = list(args)
            for position, value in sorted(decode(shared).items()):
                args.insert(position, value)
        with PluginCall(self._kind, self._worker, method):
            return getattr(self._worker, method)(*args, **kwargs)

    def drain(self, method: str, packet: Packet) -> Packet:
        """Run a generator method to its end and send nothing."""

        def run() -> None:
            for _ in self._call(method, packet):
                pass

        return _answer(run)

    def pull(self, method: str | None, packet: Packet | None) -> Packet:
        """The next items of a generator method, each a packet, and whether they are the last; begins it if named."""

        def run() -> tuple[list[Packet], bool]:
            if method is not None and packet is not None:
                self._items = iter(self._call(method, packet))
            packets: list[Packet] = []
            for item in self._items or ():
                packets.append(encode(item))
                if len(packets) == _MAX_ITEMS or sum(p.num_bytes for p in packets) >= _ITEM_BYTES:
                    return packets, False
            self._items = None
            return packets, True

        return _answer(run)

    def finish(self) -> Packet:
        """Run what was begun to its end."""

        def run() -> None:
            items, self._items = self._items, None
            for _ in items or ():
                pass

        return _answer(run)

    def stop(self) -> Packet:
        """Shut the worker down."""

        def run() -> None:
            worker, self._worker = self._worker, None
            if worker is not None:
                worker.shutdown()

        return _answer(run)


def exit_record(log: Path) -> Path:
    """Where a worker with this log leaves its exit status."""
    return log.with_suffix(".exit")


def _answer(work: Callable[[], Any]) -> Packet:
    try:
        return encode(("result", work()))
    except BaseException as error:  # reported to the driver, which raises it
        return encode(("error", report_error(error)))


def _writable(log_path: str) -> Path:
    """The log's path, or one in a temporary folder where the run's folder is not shared by the machines."""
    path = Path(log_path)
    if os.access(path, os.W_OK):  # the driver has made it
        return path
    return Path(tempfile.mkdtemp(prefix="nemo-rl-logs-")) / path.name


def _record_exits(path: Path) -> None:
    """Let `os._exit` leave its status: Ray does not tell the driver how a process ended."""
    with contextlib.suppress(OSError):
        path.unlink()
    leave = os._exit

    def recorded(status: int) -> Any:
        with contextlib.suppress(OSError):
            path.write_text(str(status), encoding="utf-8")
        leave(status)

    os._exit = recorded
