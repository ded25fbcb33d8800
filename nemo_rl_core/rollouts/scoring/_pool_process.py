"""One worker process of the pool, seen from the parent."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections import deque
from pathlib import Path

__all__ = ["WorkerProcess"]

_HEADER = struct.Struct("<Q")
_SCRIPT = str(Path(__file__).with_name("_pool_worker.py"))
_SEND_TIMEOUT_S = 30.0
_MAX_FUNCTIONS = 256
_OUTPUT_TAIL = 4096
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerProcess:
    """A process that runs `_pool_worker.py`, in its own session so that its children die with it.

    Nothing of the parent's `__main__` is run in it. Not thread-safe: the pool's lock guards it.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, **{name: os.environ.get(name, "1") for name in _THREAD_VARIABLES}}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, _SCRIPT, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=environment,
            )
        self.socket = ours
        self.socket.settimeout(_SEND_TIMEOUT_S)
        assert self.process.stdout is not None
        self.output_fd: int = self.process.stdout.fileno()
        os.set_blocking(self.output_fd, False)
        self._output: deque[bytes] = deque()
        self._output_size = 0
        self._inbox = bytearray()
        self._known: set[bytes] = set()
        self._path: list[str] = []
        self.ready = False

    def send_call(self, digest: bytes, function: bytes, arguments: bytes) -> bool:
        """Ask for one call; the function travels along if this worker has not seen it.

        Returns:
            Whether the worker will announce that it has loaded the function.
        """
        frames = []
        if self._path != sys.path:
            self._path = list(sys.path)
            frames.append(b"S" + pickle.dumps(self._path))
        ship = digest not in self._known
        if ship:
            if len(self._known) >= _MAX_FUNCTIONS:
                self._known.clear()
                frames.append(b"F")
            self._known.add(digest)
        frames.append(b"C" + digest + pickle.dumps((function if ship else None, arguments), protocol=5))
        self.socket.sendall(b"".join(_HEADER.pack(len(frame)) + frame for frame in frames))
        return ship

    def forget(self, digest: bytes) -> None:
        """The worker could not load this function."""
        self._known.discard(digest)

    def receive(self) -> tuple[list[bytes], bool]:
        """Frames that have arrived, without waiting, and whether the worker is still connected."""
        alive = True
        while True:
            try:
                chunk = self.socket.recv(1 << 18, socket.MSG_DONTWAIT)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                chunk = b""
            if not chunk:
                alive = False
                break
            self._inbox += chunk
            if len(chunk) < 1 << 18:
                break
        return self._split_frames(), alive

    def _split_frames(self) -> list[bytes]:
        frames: list[bytes] = []
        start = 0
        while len(self._inbox) - start >= _HEADER.size:
            (size,) = _HEADER.unpack_from(self._inbox, start)
            end = start + _HEADER.size + size
            if end > len(self._inbox):
                break
            frames.append(bytes(self._inbox[start + _HEADER.size : end]))
            start = end
        del self._inbox[:start]
        return frames

    def drain_output(self) -> bool:
        """Take what the worker printed, keeping the last part; False once it has closed its output."""
        while True:
            try:
                chunk = os.read(self.output_fd, 1 << 16)
            except (BlockingIOError, InterruptedError):
                return True
            except OSError:
                return False
            if not chunk:
                return False
            self._output.append(chunk)
            self._output_size += len(chunk)
            while self._output_size - len(self._output[0]) >= _OUTPUT_TAIL:
                self._output_size -= len(self._output.popleft())
            if len(chunk) < 1 << 16:
                return True

    @property
    def output_tail(self) -> str:
        """The last of what the worker printed."""
        return b"".join(self._output)[-_OUTPUT_TAIL:].decode(errors="replace").strip()

    def kill(self) -> int:
        """Kill the worker and everything it started; returns its exit status (negative: the signal)."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        self.drain_output()
        self.socket.close()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status

    def exit_status(self) -> str:
        """Why the worker ended, in words, after giving it a moment to be gone."""
        try:
            status = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        if status < 0:
            with contextlib.suppress(ValueError):
                return f"signal {signal.Signals(-status).name}"
            return f"signal {-status}"
        return f"exit status {status}"
