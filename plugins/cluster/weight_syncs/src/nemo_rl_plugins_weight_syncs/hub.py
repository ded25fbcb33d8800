"""The wires between a rank of the trainer and the engines it serves: who may send when, who failed, who is waited for.

The trainer listens, every engine connects with the refit's key. What goes over these connections are small messages
(which chunk lies where, that it was taken, that one side gave up) and the changes of `delta`; the other syncs move the
tensors themselves beside them.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from attrs import define, field, frozen

from nemo_rl_core.errors import DeadlineExceeded
from nemo_rl_core.machine.arrivals import Arrivals, arrive, limit_waits
from nemo_rl_core.machine.deadline import Deadline

__all__ = ["PROCESS", "Hub", "PeerGaveUp", "RefitDeadline", "Rendezvous", "Wire", "call_off", "connect"]

_CALL_OFF_S = 5.0
PROCESS = uuid.uuid4().hex
"""Names this process: two of them on two machines may have one process id."""


class PeerGaveUp(Exception):
    """The other side stopped; what it raised itself is the reason."""


class RefitDeadline(Deadline):
    """The deadline of a whole refit, which both sides keep on their own clock."""

    __slots__ = ("version",)

    def __init__(self, seconds: float, version: int) -> None:
        super().__init__(
            seconds,
            what=f"Refit to weight version {version}",
            hint="Raise generation.refit_timeout_s, or look at that side's log.",
        )
        self.version = version


@frozen(kw_only=True)
class Rendezvous:
    """Where an engine finds the rank that serves it in one refit."""

    address: Any
    key: bytes


@define(eq=False)
class Wire:
    """One connection between the trainer and an engine, with a deadline on every wait."""

    connection: Connection
    deadline: RefitDeadline
    peer: str
    """Who is at the other end, for messages."""
    hello: dict[str, Any] = field(factory=dict)
    """What the engine said of itself."""
    num_acked: int = 0
    loaded: bool = False
    ahead: deque[Any] = field(factory=deque)
    """Messages that were read before their turn."""

    def __attrs_post_init__(self) -> None:
        limit_waits(self.connection, max(self.deadline.remaining(), 0.001))

    def send(self, message: object) -> None:
        """Send a small message."""
        with self._told():
            self.connection.send(message)

    def send_bytes(self, data: Any) -> None:
        """Send a buffer."""
        with self._told():
            self.connection.send_bytes(data)

    def receive(self) -> Any:
        """The next message.

        Raises:
            PeerGaveUp: The other side said so, or is gone.
            DeadlineExceeded: Names the other side.
        """
        if self.ahead:
            return self.ahead.popleft()
        with self._told():
            if not self.connection.poll(self.deadline.remaining()):
                raise self.deadline.exceeded(self.peer)
            message = self.connection.recv()
        if message[0] == "gave_up":
            raise PeerGaveUp(f"{self.peer} gave up: {message[1]}")
        return message

    def peek(self) -> Any | None:
        """The message that `receive` will return next, if it is there already."""
        with self._told():
            if not self.ahead and self.connection.poll(0):
                self.ahead.append(self.receive())
        return self.ahead[0] if self.ahead else None

    def receive_bytes(self) -> bytes:
        """A buffer; raises as `receive`."""
        with self._told():
            if not self.connection.poll(self.deadline.remaining()):
                raise self.deadline.exceeded(self.peer)
            return self.connection.recv_bytes()

    def give_up(self, error: BaseException) -> None:
        """Tell the other side that this one stops."""
        with contextlib.suppress(OSError, ValueError):
            self.connection.send(("gave_up", f"{type(error).__name__}: {error}"))

    @contextlib.contextmanager
    def _told(self) -> Any:
        try:
            yield
        except BlockingIOError as error:  # the socket's own deadline
            raise self.deadline.exceeded(self.peer) from error
        except (EOFError, OSError) as error:
            if isinstance(error, DeadlineExceeded):
                raise
            raise PeerGaveUp(f"{self.peer} closed its connection ({type(error).__name__}).") from error


class Hub:
    """The trainer's end: a listener, and a wire to each engine.

    Args:
        address: Of this machine, for engines on others; None serves engines on this machine only.
    """

    def __init__(self, address: str | None) -> None:
        self.key = os.urandom(32)
        self.wires: list[Wire] = []
        self._arrivals = Arrivals(self.key, address=address, name="nemo-rl-refit-arrivals")

    @property
    def rendezvous(self) -> Rendezvous:
        """What an engine needs to connect."""
        return Rendezvous(address=self._arrivals.address, key=self.key)

    def gather(self, names: Sequence[str], deadline: RefitDeadline) -> None:
        """Wait until every engine has connected."""
        missing = list(names)
        while missing:
            try:
                connection = self._arrivals.next(deadline.remaining())
            except TimeoutError:
                raise deadline.exceeded(", ".join(missing)) from None
            if connection is None:
                raise PeerGaveUp("the refit was given up before every engine had connected.")
            wire = Wire(connection, deadline, "an engine")
            _, name, hello = wire.receive()
            wire.peer, wire.hello = name, hello
            missing.remove(name)
            self.wires.append(wire)
        self.wires.sort(key=lambda wire: names.index(wire.peer))

    def tell(self, message: object) -> None:
        """Send a message to every engine."""
        for wire in self.wires:
            wire.send(message)

    def wait_acked(self, count: int) -> None:
        """Wait until every engine has taken the first `count` chunks; raises as `Wire.receive`."""
        for wire in self.wires:
            while wire.num_acked < count or wire.connection.poll(0):  # also what tells that one gave up
                self._take(wire)

    def wait_loaded(self) -> None:
        """Wait until every engine has loaded all it was sent."""
        for wire in self.wires:
            while not wire.loaded:
                self._take(wire)

    def _take(self, wire: Wire) -> None:
        kind, *rest = wire.receive()
        if kind == "ack":
            wire.num_acked = rest[0] + 1
        elif kind == "loaded":
            wire.loaded = True

    def give_up(self, error: BaseException) -> None:
        """Tell every engine that nothing more comes."""
        for wire in self.wires:
            wire.give_up(error)

    def close(self) -> None:
        """Close every wire; may be called twice."""
        self._arrivals.close()
        for wire in self.wires:
            with contextlib.suppress(OSError):
                wire.connection.close()


def connect(rendezvous: Rendezvous, name: str, hello: dict[str, Any], deadline: RefitDeadline) -> Wire:
    """The engine's end of a wire to the trainer.

    Raises:
        DeadlineExceeded: It does not answer.
        PeerGaveUp: It does not listen any more.
    """
    try:
        left_s = max(deadline.remaining(), 0.001)
        connection = arrive(rendezvous.address, rendezvous.key, who="The trainer", timeout_s=left_s)
    except (OSError, EOFError) as error:
        raise PeerGaveUp(f"the trainer does not listen at {rendezvous.address} ({error}).") from error
    wire = Wire(connection, deadline, "the trainer")
    wire.send(("hello", name, hello))
    return wire


def call_off(rendezvous: Rendezvous, error: BaseException) -> None:
    """Tell a trainer that may still wait for engines to connect that one of them will not."""
    with (
        contextlib.suppress(OSError, EOFError, DeadlineExceeded),
        arrive(rendezvous.address, rendezvous.key, who="The trainer", timeout_s=_CALL_OFF_S) as connection,
    ):
        connection.send(("gave_up", f"{type(error).__name__}: {error}"))
