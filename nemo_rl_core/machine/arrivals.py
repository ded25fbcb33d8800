"""Socket for other processes to connect to; each proves that it knows a secret, and gets the same proof."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import queue
import socket
import struct
import tempfile
import threading
import time
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from nemo_rl_core.errors import DeadlineExceeded
from nemo_rl_core.machine.heartbeat import keep_alive

__all__ = ["Arrivals", "arrive", "limit_waits"]

_BACKLOG = 1024
"""Connections that the system takes before this process has; with few, the clients' system tries again after
seconds, and one that it gave up believes to be connected."""


def arrive(address: Any, key: bytes, *, who: str, timeout_s: float) -> Connection:
    """Connect to the `Arrivals` at `address`.

    Args:
        address: Of the socket.
        key: The secret.
        who: Listens there, for the message.
        timeout_s: Deadline of connecting and of the exchange of secrets.

    Raises:
        DeadlineExceeded: Nobody answered in time.
        OSError: Nobody listens there.
    """
    future: concurrent.futures.Future[Connection] = concurrent.futures.Future()

    def connect() -> None:
        try:
            connection = Client(address, authkey=key)
            keep_alive(connection)
        except BaseException as error:  # handed to the caller
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # nobody waits any more
                future.set_exception(error)
            return
        if not future.set_running_or_notify_cancel():
            connection.close()
            return
        future.set_result(connection)

    threading.Thread(target=connect, name="nemo-rl-arrive", daemon=True).start()
    try:
        return future.result(timeout_s)
    except concurrent.futures.TimeoutError as error:
        if not future.cancel():
            return future.result()  # it came in this very moment, or failed
        raise DeadlineExceeded(
            f"{who} did not answer at {address} in {timeout_s:g} s. Look for a firewall between the machines."
        ) from error


class Arrivals:
    """Listens until it is closed; connections wait in a queue.

    Each connection proves itself in a thread of its own: one that says nothing keeps nobody waiting.

    Args:
        key: The secret (HMAC in both directions, before anything else is read).
        address: IP address of this machine to listen at, on a free port; None listens at a path of the file system,
            which only this machine's processes reach.
        name: Of the thread.
        proof_s: How long a connection may take over each message of its proof.
    """

    def __init__(self, key: bytes, *, address: str | None, name: str, proof_s: float = 30.0) -> None:
        self._key = key
        self._name = name
        self._proof_s = proof_s
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if address is None:
            self._folder = tempfile.TemporaryDirectory(prefix="nemo-rl-")
            self._listener = Listener(str(Path(self._folder.name) / "socket"), "AF_UNIX", backlog=_BACKLOG)
        else:
            self._listener = Listener((address, 0), "AF_INET", backlog=_BACKLOG)
        self.address: Any = self._listener.address
        """For `multiprocessing.connection.Client`."""
        self._arrived: queue.SimpleQueue[Connection | None] = queue.SimpleQueue()
        self._closed = False
        threading.Thread(target=self._accept, name=name, daemon=True).start()

    def next(self, timeout_s: float | None = None) -> Connection | None:
        """The next connection; None when it was closed.

        Raises:
            TimeoutError: Nobody came in time.
        """
        try:
            return self._arrived.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"Nobody connected within {timeout_s:g} s.") from None

    def close(self) -> None:
        """Stop listening; may be called twice."""
        if self._closed:
            return
        self._closed = True
        family = socket.AF_UNIX if self._folder is not None else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family) as caller:
            caller.connect(self.address)  # nothing else wakes a thread that waits in accept()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()  # without a key it reads nothing
            except OSError:  # one who left at once, or no file descriptor is free for now
                time.sleep(0.01)
                continue
            if self._closed:  # this one is `close`
                connection.close()
                break
            threading.Thread(target=self._prove, args=(connection,), name=self._name, daemon=True).start()
        self._arrived.put(None)
        self._listener.close()
        if self._folder is not None:
            self._folder.cleanup()

    def _prove(self, connection: Connection) -> None:
        try:
            limit_waits(connection, self._proof_s)
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            limit_waits(connection, 0.0)
            keep_alive(connection)
        except Exception:  # somebody without the key, who left, or who says nothing
            connection.close()
            return
        self._arrived.put(connection)


def limit_waits(connection: Connection, seconds: float) -> None:
    """Let any one read or write of a connection's socket take `seconds` at most: then it is a BlockingIOError.

    Args:
        connection: Over a socket.
        seconds: 0 is no limit.
    """
    wait = struct.pack("@ll", int(seconds), int((seconds % 1) * 1e6))
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as shared:
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
