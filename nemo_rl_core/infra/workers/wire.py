"""Messages between the driver and its worker processes: cloudpickle, over a pipe.

So losses, configurations and components defined in a notebook or in `__main__` reach the workers. Tensors are copied
into the message: a batch is small beside the step it is for. Weights have ways of their own (weight syncs).
"""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

__all__ = ["receive", "send"]


def send(connection: Connection, message: object) -> None:
    """Send one message; raises `OSError` if the other side is gone."""
    connection.send_bytes(cloudpickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> Any:
    """Receive one message; raises `EOFError` if the other side is gone."""
    return pickle.loads(connection.recv_bytes())
