"""Serialisation of functions, arguments and results between `ProcessPool` and its workers."""

from __future__ import annotations

import functools
import hashlib
import pickle
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import cloudpickle

from nemo_rl_core.errors import RewardError
from nemo_rl_core.registry import NodeDifference, check_nodes, is_escape

__all__ = ["cannot_send", "dump", "name_of", "pickle_by_value", "pickle_function", "unpack"]


def name_of(function: Callable[..., object]) -> str:
    """Return the name of a function for messages."""
    inner = function.func if isinstance(function, functools.partial) else function
    return str(getattr(inner, "__qualname__", None) or type(inner).__name__)


def dump(value: object) -> bytes:
    """Pickle; what belongs to `__main__`, and lambdas, by value."""
    try:
        data = pickle.dumps(value, protocol=5)
    except Exception:
        data = b"__main__"
    return bytes(cloudpickle.dumps(value, protocol=5)) if b"__main__" in data else data


def pickle_function(function: Callable[..., object]) -> tuple[bytes, bytes]:
    """Digest and pickle of a function with its home."""
    try:
        data = dump(function)
    except Exception as error:
        raise cannot_send(name_of(function), "the function", error) from error
    return _packed(data, _home(function))


def _packed(function: bytes, home: tuple[str, str] | None) -> tuple[bytes, bytes]:
    data = pickle.dumps((home, function), protocol=5)
    return hashlib.blake2b(data, digest_size=16).digest(), data


def _home(function: Callable[..., object]) -> tuple[str, str] | None:
    """Module and source hash of what a worker imports by name, as they are here; None if it goes by value.

    A worker runs the same interpreter with the same `sys.path`, so it finds the same files; but a package that is
    upgraded, or a working tree that is edited, while the run goes on would be imported as it is then.
    """
    inner = function.func if isinstance(function, functools.partial) else function
    name = getattr(inner, "__module__", None) or type(inner).__module__
    file = getattr(sys.modules.get(name), "__file__", None)
    found = None if name in ("__main__", "__mp_main__") or file is None else _source_hash(file)
    return None if found is None else (name, found)


@functools.cache
def _source_hash(file: str) -> str | None:
    """Of the file as it was when it was first asked for, which is what this process has imported."""
    try:
        with open(file, "rb") as source:
            return hashlib.blake2b(source.read(), digest_size=8).hexdigest()
    except OSError:  # in an archive, or gone
        return None


_by_value_lock = threading.Lock()


def pickle_by_value(function: Callable[..., object]) -> tuple[bytes, bytes]:
    """Pickle a function whose module a worker cannot import (loaded from a file, say)."""
    name = getattr(function, "__module__", None) or type(function).__module__
    module = sys.modules.get(name)
    if module is None:
        return pickle_function(function)
    with _by_value_lock:
        cloudpickle.register_pickle_by_value(module)
        try:
            data = bytes(cloudpickle.dumps(function, protocol=5))
        except Exception as error:
            raise cannot_send(name_of(function), "the function", error) from error
        finally:
            cloudpickle.unregister_pickle_by_value(module)
    return _packed(data, None)


def cannot_send(name: str, what: str, error: Exception) -> RewardError:
    """The error that says what cannot be sent, and what to do."""
    return RewardError(
        f"{name}: {what} cannot be sent to a worker process ({type(error).__name__}: {error}). "
        "Use a function of a module with plain data as arguments, or run it in a thread."
    )


def unpack(name: str, answer: bytes) -> Any:
    """Return the value of an answer, or raise what the function raised.

    Raises:
        PluginIncompatible: The worker imported another version of the function's module; the message holds a table.
    """
    if answer[:1] == b"V":
        return pickle.loads(answer[1:])
    if answer[:1] == b"D":
        module, found, expected = pickle.loads(answer[1:])
        node = f"{socket.gethostname()} reward process"
        check_nodes([NodeDifference(node, f"{module} ({name})", f"source {found}", f"source {expected}")])
    type_name, message, trace, pickled = pickle.loads(answer[1:])
    error: BaseException
    try:
        error = pickle.loads(pickled) if pickled is not None else RewardError(f"{type_name}: {message}")
    except Exception:
        error = RewardError(f"{type_name}: {message}")
    if not isinstance(error, Exception) or is_escape(error):  # SystemExit and the like must not end the caller
        error = RewardError(f"{name} raised {type_name}: {message}")
    error.add_note(f"Raised by {name} in a worker process:\n{trace}")
    raise error
