"""Detection of a peer that neither answers nor ends: a process that hangs, a machine that is gone."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from nemo_rl_core.machine.threads import daemon

__all__ = ["Heartbeat", "keep_alive", "shut"]

_LONGEST_PERIOD_S = 5.0
_BEATS = 12
"""Pings in the time that a peer may be silent, at least."""


class Heartbeat:
    """Pings a peer and says when nothing was heard for too long.

    Time is counted in the watch's own beats: while this process itself stands still (a debugger, a laptop that sleeps)
    the peer is not blamed.

    Args:
        ping: Sends a ping; must not block.
        on_silence: Called once, in the watch's thread.
        timeout_s: How long the peer may be silent.
        name: Of the thread.
    """

    def __init__(
        self, *, ping: Callable[[], object], on_silence: Callable[[], object], timeout_s: float, name: str
    ) -> None:
        self.timeout_s = timeout_s
        self.is_late = False
        """Whether a ping has found no answer for a whole period."""
        self._period_s = min(timeout_s / _BEATS, _LONGEST_PERIOD_S)
        self._ping, self._on_silence = ping, on_silence
        self._heard = 0
        self._stopped = threading.Event()
        daemon(self._watch, name=name)

    def heard(self) -> None:
        """Something came from the peer. Of one thread only."""
        self._heard += 1
        self.is_late = False

    def stop(self) -> None:
        """Watch no longer; may be called twice."""
        self._stopped.set()

    def _watch(self) -> None:
        allowed = math.ceil(self.timeout_s / self._period_s)
        seen, silent = -1, 0
        while not self._stopped.wait(self._period_s):
            heard = self._heard
            if heard != seen:
                seen, silent = heard, 0
                self._ping()
                continue
            silent += 1
            self.is_late = True
            if silent >= allowed:
                self._on_silence()
                return


def keep_alive(connection: Connection, *, timeout_s: float | None = None) -> None:
    """Let the kernel notice that the machine at the other end is gone; of no effect on a socket of the file system.

    Args:
        connection: A TCP connection.
        timeout_s: What was sent must be taken by the other end within this; None leaves it to TCP, as is right where
            the other end may be busy for long before it reads.
    """
    with contextlib.suppress(OSError), _socket_of(connection) as tcp:
        if tcp.family not in (socket.AF_INET, socket.AF_INET6):
            return
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):  # not every system has these
                tcp.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        if timeout_s is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))


def shut(connection: Connection) -> None:
    """End a connection so that a thread which waits to read from it, or to write to it, wakes up."""
    with contextlib.suppress(OSError), _socket_of(connection) as one:
        one.shutdown(socket.SHUT_RDWR)


def _socket_of(connection: Connection) -> socket.socket:
    """The socket under a connection, with a descriptor of its own."""
    return socket.socket(fileno=os.dup(connection.fileno()))
