"""Messages between the driver and its worker processes.

Tensors travel through shared memory (torch's reductions), everything else by cloudpickle, so that losses,
configurations and components defined in a notebook or in `__main__` reach the workers.
"""

from __future__ import annotations

import io
import pickle
from collections import ChainMap
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

__all__ = ["receive", "send"]


def send(connection: Connection, message: Any) -> None:
    """Send one message; raises `OSError` if the other side is gone."""
    buffer = io.BytesIO()
    _pickler(buffer).dump(message)
    connection.send_bytes(buffer.getbuffer())


def receive(connection: Connection) -> Any:
    """Receive one message; raises `EOFError` if the other side is gone."""
    return pickle.loads(connection.recv_bytes())


def _pickler(buffer: io.BytesIO) -> Any:
    from multiprocessing.reduction import ForkingPickler

    import torch.multiprocessing  # registers the reductions of tensors  # noqa: F401

    pickler: Any = cloudpickle.CloudPickler(buffer, protocol=pickle.HIGHEST_PROTOCOL)
    reductions: Any = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    pickler.dispatch_table = ChainMap({}, reductions, cloudpickle.CloudPickler.dispatch_table)
    return pickler
