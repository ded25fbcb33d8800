"""The weight sync `delta`: only what changed since the last refit, over sockets; for slow links between machines.

The trainer's rank 0 and every engine's process keep the weights of the last refit in memory (in the engine's type).
A refit compares the bits, sends the changed ones, and each engine loads from its own copy. An engine that has no such
copy (the first time, after a restart, after a failure) makes the refit a full one for everybody.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from nemo_rl_core.machine.place import Place
from nemo_rl_plugins_weight_syncs.base import StreamedSync
from nemo_rl_plugins_weight_syncs.config import DeltaConfig
from nemo_rl_plugins_weight_syncs.hub import Hub, Wire
from nemo_rl_plugins_weight_syncs.packing import Chunk
from nemo_rl_plugins_weight_syncs.session_cache import keep
from nemo_rl_plugins_weight_syncs.sparse import Change, apply, difference
from nemo_rl_plugins_weight_syncs.streaming import Transfer

__all__ = ["DeltaSync"]


class DeltaSync(StreamedSync):
    """Sparse changes of the weights, bit for bit."""

    config_class: ClassVar[type] = DeltaConfig

    def __init__(self, config: DeltaConfig | None = None) -> None:
        super().__init__(config)
        self._refits = itertools.count()

    def carriers(self, trainer: Place, engines: list[Place], transfer: Transfer) -> tuple[tuple[Any, ...], ...]:
        """Sockets reach everywhere."""
        every = self.config.full_every
        return (_Out, bool(every) and next(self._refits) % every == 0), (_In,)


class _Base:
    """The weights of the last refit, as one side has them."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.digest = ""
        """Of the refit that left them; empty while they are changed and after that failed."""


class _Out:
    """Sends changes. Its `num_bytes_sent` counts them, with what describes them."""

    in_flight = 2

    def __init__(self, transfer: Transfer, device: str, full: bool) -> None:
        self.full = full
        self.base: _Base = keep(transfer.key("sent base"), _Base)
        self.num_bytes_sent: int | None = 0

    def begin(self, hub: Hub, num_engines: int) -> None:
        """Full if some engine has another base than this side."""
        common = self.base.digest and all(wire.hello["base"] == self.base.digest for wire in hub.wires)
        if self.full or not common:
            self.base.tensors.clear()
        self.base.digest = ""
        hub.tell(("start",))

    def send(self, hub: Hub, number: int, chunk: Chunk) -> None:
        changes, pieces = [], []
        for entry, tensor in zip(chunk.entries, chunk.tensors, strict=True):
            here = tensor.detach().contiguous()
            base = self.base.tensors.get(entry.name)
            fits = base is not None and base.shape == here.shape and base.dtype == here.dtype
            change, parts = difference(entry.name, here, base if fits else None)
            if not fits:
                self.base.tensors[entry.name] = here.to("cpu", copy=True)
            changes.append(change)
            pieces += parts
        data = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)
        for wire in hub.wires:
            wire.send(("chunk", number, changes))
            wire.send_bytes(data.numpy())
        self.num_bytes_sent = (self.num_bytes_sent or 0) + data.numel()

    def end(self, digest: str) -> None:
        self.base.digest = digest


class _In:
    """Applies changes to its own copy and loads from that."""

    def __init__(self, transfer: Transfer, device: str) -> None:
        self.base: _Base = keep(transfer.key("received base"), _Base)

    def hello(self) -> dict[str, Any]:
        return {"base": self.base.digest}

    def begin(self, wire: Wire) -> None:
        wire.receive()
        self.base.digest = ""

    def take(self, wire: Wire, message: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors [...] that a chunk of changes makes of those before."""
        changes: Sequence[Change] = message[2]
        data = torch.frombuffer(bytearray(wire.receive_bytes()) or bytearray(1), dtype=torch.uint8)
        at = 0
        for change in changes:
            piece = data[at : at + change.num_bytes]
            at += change.num_bytes
            tensor = apply(change, piece, self.base.tensors.get(change.name))
            self.base.tensors[change.name] = tensor
            yield change.name, tensor

    def end(self, digest: str) -> None:
        self.base.digest = digest
