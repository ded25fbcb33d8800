"""The child side of a worker process: takes calls from a connection until it is told to stop.

Importing this module must not import torch: thread counts are set first.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["run"]


def run(connection: Connection, payload: bytes, environment: dict[str, str], log_path: str) -> None:
    """Entry point of the process.

    Args:
        connection: To the driver.
        payload: cloudpickled (factory, config, context).
        environment: Set before anything heavy is imported.
        log_path: File that receives standard output and error.
    """
    _redirect(log_path)
    os.environ.update(environment)
    _die_with_parent()
    import cloudpickle

    from nemo_rl_core.infra._wire import receive, send
    from nemo_rl_core.infra.local import make_worker

    worker: Any = None
    try:
        factory, config, context = cloudpickle.loads(payload)
        if context.num_threads is not None:
            import torch

            torch.set_num_threads(context.num_threads)
        worker = make_worker(factory)
        worker.setup(config, context)
    except BaseException as error:  # reported to the driver, which raises it
        send(connection, ("error", describe(error)))
        return
    send(connection, ("result", None))
    while True:
        try:
            kind, *rest = receive(connection)
        except EOFError:
            return
        if kind == "stop":
            _stop(connection, worker)
            return
        try:
            if kind == "call":
                method, args, kwargs = rest
                send(connection, ("result", getattr(worker, method)(*args, **kwargs)))
            else:
                _iterate(connection, worker, *rest)
        except (BrokenPipeError, ConnectionError):
            return
        except BaseException as error:  # reported to the driver, which raises it
            send(connection, ("error", describe(error)))


def _iterate(connection: Connection, worker: Any, method: str, args: tuple[Any, ...], stream: bool) -> None:
    """Run a generator to its end; send its items, each on request, until the driver wants no more."""
    from nemo_rl_core.infra._wire import receive, send

    for item in getattr(worker, method)(*args):
        if stream:
            send(connection, ("item", item))
            stream = receive(connection) == "next"
    send(connection, ("result", None))


def _stop(connection: Connection, worker: Any) -> None:
    from nemo_rl_core.infra._wire import send

    try:
        worker.shutdown()
        send(connection, ("result", None))
    except BaseException as error:  # reported to the driver, which logs it
        send(connection, ("error", describe(error)))


def describe(error: BaseException) -> tuple[BaseException | None, str, str]:
    """The exception if it can be pickled, its one-line summary, and its traceback."""
    import cloudpickle

    summary = f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))
    try:
        bare = error.with_traceback(None)
        bare.__cause__ = bare.__context__ = None
        cloudpickle.loads(cloudpickle.dumps(bare))
    except Exception:  # any object may refuse to be pickled
        return None, summary, trace
    return bare, summary, trace


def _redirect(log_path: str) -> None:
    """Send file descriptors 1 and 2 to the log, so that also what C libraries write is kept."""
    file = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _die_with_parent() -> None:
    """End this process when the driver's ends, however it ends, also in the middle of a call."""
    import multiprocessing
    from multiprocessing.connection import wait

    # Daemonic, so that the driver's exit ends it; but an engine in a worker may need processes of its own.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
