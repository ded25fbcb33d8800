"""The child side of a worker process: takes calls from a connection until it is told to stop.

Importing this module must not import torch: in a process that is spawned, plugins are verified and thread counts are
set first.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NoReturn

from nemo_rl_core.infra.workers.remote import adopt_environment, redirect_output, report_error, trace_calls
from nemo_rl_core.machine.threads import watch_parent

if TYPE_CHECKING:
    from nemo_rl_core.protocols.launcher import Worker

__all__ = ["run", "verify"]


def run(
    connection: Connection,
    payload: bytes,
    inherited: dict[str, str],
    environment: dict[str, str],
    log_path: str,
    manifest: str,
) -> None:
    """Entry point of the process.

    Args:
        connection: To the driver.
        payload: cloudpickled (factory, config, context).
        inherited: Environment of the driver; a process that was forked has an older one.
        environment: Variables of this worker, set before a plugin is imported.
        log_path: File that receives standard output and error.
        manifest: Rows of the plugins that this process must have, as JSON; compared before all else.
    """
    _leave_terminal()
    redirect_output(log_path)
    os.environ.clear()
    os.environ.update(inherited)
    adopt_environment(environment)
    _die_with_parent()
    if not verify(connection, manifest):
        return
    import cloudpickle

    from nemo_rl_core.infra.workers.making import kind_of, make_worker
    from nemo_rl_core.infra.workers.wire import receive, send
    from nemo_rl_core.registry import PluginCall

    try:
        factory, config, context = cloudpickle.loads(payload)
        trace_calls(context)
        component_kind = kind_of(factory)
        if context.num_threads is not None:
            import torch

            torch.set_num_threads(context.num_threads)
        worker: Worker = make_worker(factory)
        with PluginCall(component_kind, worker, "setup"):
            worker.setup(config, context)
    except BaseException as error:  # reported to the driver, which raises it
        send(connection, ("error", report_error(error)))
        return
    send(connection, ("result", None))
    while True:
        try:
            kind, *rest = receive(connection)
        except EOFError:  # the driver is gone
            _end_session()
        if kind == "stop":
            _stop(connection, worker)
            return
        try:
            if kind in ("call", "run"):  # what is run has a result that nobody wants
                method, args, kwargs = rest
                with PluginCall(component_kind, worker, method):
                    result = getattr(worker, method)(*args, **kwargs)
                send(connection, ("result", result if kind == "call" else None))
                del result, args, kwargs
            else:
                with PluginCall(component_kind, worker, rest[0]):
                    _iterate(connection, worker, *rest)
        except (BrokenPipeError, ConnectionError):
            _end_session()
        except BaseException as error:  # reported to the driver, which raises it
            send(connection, ("error", report_error(error)))


def verify(connection: Connection, manifest: str) -> bool:
    """Tell the driver how this process's plugins differ from the manifest's; return whether that worked.

    Takes a fraction of a second: neither torch nor a plugin is imported.
    """
    from nemo_rl_core.registry import get_registry, node_differences

    try:
        answer: tuple[str, Any] = ("result", node_differences(json.loads(manifest), get_registry()))
    except BaseException as error:  # reported to the driver, which raises it
        answer = ("error", report_error(error))
    connection.send_bytes(pickle.dumps(answer))  # as `_wire.send` would, which imports torch
    return answer[0] == "result"


def _iterate(connection: Connection, worker: object, method: str, args: tuple[Any, ...], stream: bool) -> None:
    """Run a generator to its end and send its items, each on request, until the driver wants no more."""
    from nemo_rl_core.infra.workers.wire import receive, send

    for item in getattr(worker, method)(*args):
        if stream:
            send(connection, ("item", item))
            stream = receive(connection) == "next"
    send(connection, ("result", None))


def _stop(connection: Connection, worker: Worker) -> None:
    from nemo_rl_core.infra.workers.wire import send

    try:
        worker.shutdown()
        send(connection, ("result", None))
    except BaseException as error:  # reported to the driver, which logs it
        send(connection, ("error", report_error(error)))


def _leave_terminal() -> None:
    """Leave Ctrl-C to the driver, which saves with this process's help and then ends it.

    A terminal sends the signal to the whole process group of the command. In a session of its own this process does not
    get it, nor do those that it starts (an engine's), whatever these do with a signal; who ends it can end them too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # it leads a session already
        os.setsid()


def _die_with_parent() -> None:
    """End this process and all that it started as soon as the driver's process has ended, even during a call."""
    import multiprocessing

    # Daemonic, so that the driver's exit ends it; but an engine in a worker may need processes of its own.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    if multiprocessing.parent_process() is not None:
        watch_parent(_end_session, name="parent-watch")


def _end_session() -> NoReturn:
    """End this process and what it started."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
