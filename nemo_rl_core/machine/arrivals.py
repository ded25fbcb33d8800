"""A socket to which other processes connect; both sides prove that they know a secret."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import queue
import socket
import struct
import tempfile
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from pathlib import Path

from nemo_rl_core.errors import DeadlineExceeded
from nemo_rl_core.machine.deadline import Deadline
from nemo_rl_core.machine.heartbeat import keep_alive
from nemo_rl_core.machine.threads import daemon

__all__ = ["Address", "Arrivals", "arrive", "limit_waits"]

Address = str | tuple[str, int]
"""Address of a socket: a path of this machine's file system, or host and port."""

_BACKLOG = 1024
"""Connections that the system takes before this process has; with few, the clients' system tries again after
seconds, and one that it gave up believes to be connected."""
_GREETING = b"#CHALLENGE#"
_SIZE = 32
"""Bytes of a random number, and of a proof."""


def arrive(address: Address, key: bytes, *, who: str, timeout_s: float) -> Connection:
    """Connect to the `Arrivals` at `address`.

    Args:
        address: Address of the socket.
        key: The secret.
        who: Name of the process that listens there, for the message.
        timeout_s: Deadline of connecting and of the exchange of secrets.

    Raises:
        DeadlineExceeded: Nobody answered in time.
        AuthenticationError: The two do not know the same secret.
        OSError: Nobody listens there.
    """
    deadline = Deadline(timeout_s)
    caller = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    try:
        _limit(caller, deadline.remaining() or 0.001)
        caller.connect(address)
        theirs, ours = _read(caller, len(_GREETING) + _SIZE, deadline)[len(_GREETING) :], os.urandom(_SIZE)
        caller.sendall(ours + _proof(key, b"who arrives", theirs, ours))
        if not hmac.compare_digest(_read(caller, _SIZE, deadline), _proof(key, b"who listens", theirs, ours)):
            raise AuthenticationError(f"{who} at {address} does not know the same secret.")
        _limit(caller, 0.0)
    except (BlockingIOError, TimeoutError) as error:  # what the kernel says at the end of the limit
        caller.close()
        raise DeadlineExceeded(
            f"{who} did not answer at {address} in {timeout_s:g} s. Look for a firewall between the machines."
        ) from error
    except BaseException:
        caller.close()
        raise
    connection = Connection(caller.detach())
    keep_alive(connection)
    return connection


def _read(caller: socket.socket, size: int, deadline: Deadline) -> bytes:
    found = b""
    while len(found) < size:
        _limit(caller, deadline.remaining() or 0.001)
        part = caller.recv(size - len(found))
        if not part:
            raise EOFError("The other side closed the connection before it had proved the secret.")
        found += part
    return found


def _proof(key: bytes, side: bytes, listener: bytes, caller: bytes) -> bytes:
    """Proof that one side knows the key, made of both sides' random numbers; the other side cannot reuse it."""
    return hmac.digest(key, side + listener + caller, "sha256")


class Arrivals:
    """Listens until it is closed, and keeps connections in a queue.

    One thread serves all that prove themselves at a time: one that says nothing keeps nobody waiting.

    Args:
        key: The secret (HMAC in both directions, before anything else is read).
        address: IP address of this machine to listen at, on a free port; None listens at a path of the file system,
            which only this machine's processes reach.
        name: Of the thread.
        proof_s: How long a connection may take over its proof.
    """

    def __init__(self, key: bytes, *, address: str | None, name: str, proof_s: float = 30.0) -> None:
        self._key = key
        self._proof_s = proof_s
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._listener = socket.socket(socket.AF_UNIX if address is None else socket.AF_INET)
        if address is None:
            self._folder = tempfile.TemporaryDirectory(prefix="nemo-rl-")
            self._listener.bind(str(Path(self._folder.name) / "socket"))
        else:
            self._listener.bind((address, 0))
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self.address: Address = self._listener.getsockname()
        """For `arrive`."""
        self._arrived: queue.SimpleQueue[Connection | None] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._closed = asyncio.Event()
        self._proving: set[asyncio.Task[None]] = set()
        daemon(self._serve, name=name)

    def next(self, timeout_s: float | None = None) -> Connection | None:
        """Wait for the next connection; None once this was closed.

        Raises:
            TimeoutError: Nobody came in time.
        """
        try:
            return self._arrived.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"Nobody connected within {timeout_s:g} s.") from None

    def close(self) -> None:
        """Stop listening; may be called twice."""
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._closed.set)

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._until_closed())  # what still proves itself is cancelled
        self._arrived.put(None)
        self._listener.close()
        if self._folder is not None:
            self._folder.cleanup()

    async def _until_closed(self) -> None:
        accepting = asyncio.create_task(self._accept())
        await self._closed.wait()
        accepting.cancel()

    async def _accept(self) -> None:
        while True:
            try:
                caller, _ = await self._loop.sock_accept(self._listener)
            except OSError:  # one who left at once, or no file descriptor is free for now
                await asyncio.sleep(0.01)
                continue
            proving = asyncio.create_task(self._prove(caller))
            self._proving.add(proving)
            proving.add_done_callback(self._proving.discard)

    async def _prove(self, caller: socket.socket) -> None:
        ours = os.urandom(_SIZE)
        with caller, contextlib.suppress(OSError, TimeoutError, EOFError):  # who left, or who says nothing
            async with asyncio.timeout(self._proof_s):
                await self._loop.sock_sendall(caller, _GREETING + ours)
                theirs = await self._read(caller, _SIZE)
                proof = await self._read(caller, _SIZE)
                if not hmac.compare_digest(proof, _proof(self._key, b"who arrives", ours, theirs)):
                    await self._loop.sock_sendall(caller, bytes(_SIZE))
                    return
                await self._loop.sock_sendall(caller, _proof(self._key, b"who listens", ours, theirs))
            caller.setblocking(True)
            connection = Connection(caller.detach())
            keep_alive(connection)
            self._arrived.put(connection)

    async def _read(self, caller: socket.socket, size: int) -> bytes:
        found = b""
        while len(found) < size:
            part = await self._loop.sock_recv(caller, size - len(found))
            if not part:
                raise EOFError
            found += part
        return found


def limit_waits(connection: Connection, seconds: float) -> None:
    """Let any one read or write of a connection's socket take `seconds` at most: then it is a BlockingIOError.

    Args:
        connection: Over a socket.
        seconds: 0 is no limit.
    """
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as shared:
        _limit(shared, seconds)


def _limit(one: socket.socket, seconds: float) -> None:
    wait = struct.pack("@ll", int(seconds), int((seconds % 1) * 1e6))
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
