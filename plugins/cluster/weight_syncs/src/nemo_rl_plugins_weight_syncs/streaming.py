"""Chunks of weights on their way: the trainer packs the next one while the engines load the last.

A `Carrier` moves a chunk's bytes and nothing else; order, deadlines, back-pressure, failures and the digest are the
same for all of them and stand here.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from attrs import frozen
from torch import Tensor

from nemo_rl_core.infra.weights.transfer import OutgoingWeights
from nemo_rl_plugins_weight_syncs.hub import Hub, PeerGaveUp, RefitDeadline, Rendezvous, Wire, connect
from nemo_rl_plugins_weight_syncs.packing import Chunk, chunks
from nemo_rl_plugins_weight_syncs.session_cache import forget, keep, start_epoch

if TYPE_CHECKING:
    from nemo_rl_core.protocols.generation_backend import GenerationBackend
    from nemo_rl_core.protocols.training_backend import TrainingBackend


__all__ = ["InCarrier", "OutCarrier", "Received", "Route", "Sent", "Transfer", "open_hub", "receive", "send"]


class OutCarrier(Protocol):
    """The trainer's end of a way to move chunks."""

    num_bytes_sent: int | None
    """To one engine, if that is not what was packed."""
    in_flight: int
    """Chunks that may be packed but not yet taken: its buffers."""

    def begin(self, hub: Hub, num_engines: int) -> None:
        """Called when all engines have connected."""

    def send(self, hub: Hub, number: int, chunk: Chunk) -> None:
        """Move chunk `number`; the buffer of chunk `number - in_flight` is free. Announces it to the engines."""

    def end(self, digest: str) -> None:
        """Every engine has loaded everything."""


class InCarrier(Protocol):
    """An engine's end."""

    def hello(self) -> dict[str, Any]:
        """What the trainer is told of this engine."""

    def begin(self, wire: Wire) -> None:
        """Called when connected."""

    def take(self, wire: Wire, message: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors [...] of the chunk that a message announces, valid until the next one is asked for."""

    def end(self, digest: str) -> None:
        """Everything was loaded."""


@frozen(kw_only=True)
class Transfer:
    """What both sides of one refit know."""

    session: str
    """Of the weight sync, for what is kept from refit to refit."""
    epoch: int = 0
    """Counts the failures of the session."""
    version: int
    timeout_s: float
    chunk_bytes: int
    dtype: torch.dtype | None
    """Of the engines' weights."""
    fingerprint: bool

    def key(self, what: str) -> tuple[str, str, int]:
        """Under which something of this session is kept."""
        return what, self.session, self.epoch

    @property
    def deadline(self) -> RefitDeadline:
        """From now, in this process."""
        return RefitDeadline(self.timeout_s, self.version)


@frozen(kw_only=True)
class Route:
    """Route from one rank of the trainer to the engines that it serves."""

    names: tuple[str, ...]
    """Names of the engines."""
    device: str
    """Device of the rank's weights, as its `Place` has it."""
    carrier: tuple[Any, ...]
    """Factory of the `OutCarrier`, called with (transfer, device, *options), followed by the options."""


@frozen(kw_only=True)
class Sent:
    """What a rank that served engines says of a refit."""

    num_tensors: int
    num_bytes: int
    num_bytes_sent: int | None
    fingerprint: str
    """Digest of the weights; any name for this refit if none is asked for."""


@frozen(kw_only=True)
class Received:
    """What an engine says of a refit."""

    fingerprint: str | None


def open_hub(backend: object, rank: int, transfer: Transfer, addresses: Mapping[int, str | None]) -> Rendezvous | None:
    """On every rank of the trainer: those that serve engines listen for them.

    Args:
        backend: The training backend.
        rank: Its rank.
        transfer: The refit.
        addresses: By serving rank: where to listen; None for engines on its own machine.
    """
    if rank not in addresses:
        return None
    address = addresses[rank]
    start_epoch(transfer.session, transfer.epoch)
    key = transfer.key("hub")
    forget(key)
    hub: Hub = keep(key, lambda: Hub(address))
    return hub.rendezvous


def send(backend: TrainingBackend, rank: int, transfer: Transfer, routes: Mapping[int, Route]) -> Sent | None:
    """On every rank of the trainer: export the weights; send them on those that serve engines.

    Args:
        backend: The training backend.
        rank: Its rank.
        transfer: The refit.
        routes: Route of each serving rank.
    """
    source = iter(backend.export_weights())
    route = routes.get(rank)
    if route is None:
        for _ in source:
            pass
        return None
    key = transfer.key("hub")
    hub: Hub = keep(key, lambda: Hub(None))
    try:
        return _send(hub, source, transfer, route)
    except BaseException as error:
        hub.give_up(error)
        forget(transfer.key("slots"))  # no named memory outlives a refit that failed
        for _ in source:  # the other ranks export on: a collective is never left half way
            pass
        raise
    finally:
        forget(key)


def _send(hub: Hub, source: Iterator[tuple[str, Tensor]], transfer: Transfer, route: Route) -> Sent:
    """Send tensors [...] in chunks to the engines of one route."""
    make, *options = route.carrier
    carrier: OutCarrier = make(transfer, route.device, *options)
    hub.gather(route.names, transfer.deadline)
    carrier.begin(hub, len(route.names))
    outgoing = OutgoingWeights(source, transfer.dtype, digest=False)
    for number, chunk in enumerate(chunks(outgoing, transfer.chunk_bytes)):
        hub.wait_acked(number - carrier.in_flight + 1)
        carrier.send(hub, number, chunk)
        if transfer.fingerprint:  # while the engines load the chunk
            for entry, tensor in zip(chunk.entries, chunk.tensors, strict=True):
                outgoing.digest.add(entry.name, tensor)
    digest = outgoing.digest.hexdigest() if transfer.fingerprint else uuid.uuid4().hex
    hub.tell(("end", digest))
    hub.wait_loaded()
    carrier.end(digest)
    return Sent(
        num_tensors=outgoing.num_tensors,
        num_bytes=outgoing.num_bytes,
        num_bytes_sent=carrier.num_bytes_sent,
        fingerprint=digest,
    )


def receive(
    engine: GenerationBackend,
    name: str,
    rendezvous: Rendezvous,
    transfer: Transfer,
    device: str,
    carrier: Any,
    *options: Any,
) -> Received:
    """In an engine's process: load the weights that the trainer sends.

    Args:
        engine: The generation backend.
        name: Of this engine.
        rendezvous: Where the trainer listens.
        transfer: The refit.
        device: Of the engine, as its `Place` has it.
        carrier: Makes the `InCarrier` from (transfer, device, *options).
        options: Of the carrier.
    """
    start_epoch(transfer.session, transfer.epoch)
    made: InCarrier = carrier(transfer, device, *options)
    wire = connect(rendezvous, name, made.hello(), transfer.deadline)
    stream = _Stream(wire, made)
    try:
        made.begin(wire)
        engine.update_weights(transfer.version, stream, share=False)
        stream.drain()
        made.end(stream.digest)
        wire.send(("loaded",))
    except BaseException as error:
        if not isinstance(error, PeerGaveUp):
            wire.give_up(error)
        raise
    finally:
        wire.connection.close()
    return Received(fingerprint=engine.fingerprint() if transfer.fingerprint else None)


class _Stream:
    """The tensors of one refit in the order in which they come."""

    def __init__(self, wire: Wire, carrier: InCarrier) -> None:
        self.wire = wire
        self.carrier = carrier
        self.digest = ""
        self._tensors = self._read()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._tensors

    def drain(self) -> None:
        """Take what the engine left: its fingerprint will tell."""
        for _ in self._tensors:
            pass

    def _read(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors [...] of all chunks, and acknowledge each chunk."""
        while True:
            message = self.wire.receive()
            if message[0] == "end":
                self.digest = message[1]
                return
            number = message[1]
            yield from self.carrier.take(self.wire, message)
            self.wire.send(("ack", number))
