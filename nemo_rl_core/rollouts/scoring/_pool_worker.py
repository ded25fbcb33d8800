"""Main loop of a `ProcessPool` worker: standard library only, so that it starts in milliseconds.

Run as a script, `python _pool_worker.py <fd> <parent pid>`, never imported by a worker as part of the
package. Frames in both directions are an 8-byte length and a body; the first byte of a body is its kind:

    to the worker    S  pickled list: sys.path of the parent
                     F  forget all functions
                     C  16-byte digest of a function, then pickled (function or None, pickled (args, kwargs)); a
                        function is pickled (home, pickled function), its home (module, source hash) or None
    from the worker  R  ready
                     L  the function that came with the call is loaded: the clock of the call starts
                     V  pickled result
                     E  pickled (type name, message, traceback text, pickled exception or None)
                     M  text: the function could not be loaded because a module is missing
                     D  pickled (module, source hash here, that of the parent): it is not the same code
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from typing import Any

__all__ = ["main"]

_HEADER = struct.Struct("<Q")


def _receive(sock: socket.socket) -> bytes | None:
    """The next body; None when the parent has closed the connection."""
    header = _receive_exactly(sock, _HEADER.size)
    return None if header is None else _receive_exactly(sock, _HEADER.unpack(header)[0])


def _receive_exactly(sock: socket.socket, size: int) -> bytes | None:
    chunks: list[bytes] = []
    while size:
        chunk = sock.recv(min(size, 1 << 20))
        if not chunk:
            return None
        chunks.append(chunk)
        size -= len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _send(sock: socket.socket, kind: bytes, body: bytes = b"") -> None:
    sock.sendall(_HEADER.pack(len(body) + 1) + kind + body)


def _dump(value: object) -> bytes:
    try:
        data = pickle.dumps(value, protocol=5)
    except Exception:
        data = b"__main__"
    if b"__main__" not in data:
        return data
    import cloudpickle  # by value: the parent has another __main__

    return bytes(cloudpickle.dumps(value, protocol=5))


def _describe(error: BaseException) -> bytes:
    try:
        pickled: bytes | None = _dump(error)
    except Exception:
        pickled = None
    try:
        text = str(error)
    except BaseException as second:
        text, pickled = f"(its text cannot be shown: __str__ raised {type(second).__name__})", None
    return pickle.dumps((type(error).__name__, text, traceback.format_exc(), pickled))


def _call(sock: socket.socket, body: bytes, functions: dict[bytes, Any]) -> None:
    digest = body[1:17]
    try:
        pickled_function, pickled_arguments = pickle.loads(body[17:])
        if pickled_function is not None:
            home, data = pickle.loads(pickled_function)
            try:
                function = pickle.loads(data)
            except ModuleNotFoundError as error:
                _send(sock, b"M", str(error).encode())
                return
            if home is not None and home[0] in sys.modules:  # else it came by value
                found = _source_hash(home[0])
                if found != home[1]:
                    _send(sock, b"D", pickle.dumps((home[0], found, home[1])))
                    return
            functions[digest] = function
            _send(sock, b"L")
        args, kwargs = pickle.loads(pickled_arguments)
        answer = b"V" + _dump(functions[digest](*args, **kwargs))
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: a reward must not end its worker unseen
        answer = b"E" + _describe(error)
    _send(sock, answer[:1], answer[1:])


def _source_hash(module: str) -> str | None:
    """Of the file that was imported here under this name."""
    try:
        with open(str(sys.modules[module].__file__), "rb") as source:
            return hashlib.blake2b(source.read(), digest_size=8).hexdigest()
    except (KeyError, AttributeError, OSError):
        return None


def _die_with_parent(parent: int) -> None:
    """Kill this process group when the parent is gone, even while a call hangs."""
    if sys.platform == "linux":
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import ctypes

            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def main(fd: int, parent: int) -> None:
    """Serve calls on the socket `fd` until the parent closes it."""
    _die_with_parent(parent)
    sock = socket.socket(fileno=fd)
    sock.setblocking(True)
    functions: dict[bytes, Any] = {}
    _send(sock, b"R")
    while (body := _receive(sock)) is not None:
        if body[:1] == b"S":
            sys.path[:] = pickle.loads(body[1:])
        elif body[:1] == b"F":
            functions.clear()
        else:
            _call(sock, body, functions)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
