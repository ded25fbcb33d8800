"""The weight sync `collective`: packed chunks, broadcast from the trainer's rank 0 to every engine.

The group that they are broadcast in is one of its own (gloo or NCCL), beside whatever groups the trainer and the
engines have among themselves; it is made at the first refit and again when an engine was replaced.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_rl_core._errors import ConfigError
from nemo_rl_core.infra.place import Place
from nemo_rl_plugins_weight_syncs.base import StreamedSync
from nemo_rl_plugins_weight_syncs.config import CollectiveConfig
from nemo_rl_plugins_weight_syncs.hub import PROCESS, Deadline, Hub, PeerGaveUp, Wire
from nemo_rl_plugins_weight_syncs.kept import forget, keep
from nemo_rl_plugins_weight_syncs.packing import Chunk, pack, unpack
from nemo_rl_plugins_weight_syncs.streaming import Transfer

__all__ = ["CollectiveSync"]

_NUM_SLOTS = 2


class CollectiveSync(StreamedSync):
    """Weights by broadcast, between machines as well."""

    config_class: ClassVar[type] = CollectiveConfig

    def carriers(self, trainer: Place, engines: list[Place], transfer: Transfer) -> tuple[tuple[Any, ...], ...]:
        """NCCL where everyone has a CUDA device of their own, else gloo.

        Raises:
            ConfigError: NCCL is asked for, but two share a device or one has none.
        """
        devices = [place.device_id for place in (trainer, *engines)]
        apart = all(devices) and len(set(devices)) == len(devices)
        backend = self.config.backend
        if backend == "nccl" and not apart:
            raise ConfigError(
                "weight_sync.options.backend is nccl, which needs a CUDA device of its own for the trainer's rank 0 "
                f"and for each engine; found {[place.device for place in (trainer, *engines)]}. Set backend: gloo, or "
                "weight_sync: shared_memory where they share a device."
            )
        chosen = "nccl" if backend == "nccl" or (backend == "auto" and apart) else "gloo"
        address = trainer.address if any(place.machine != trainer.machine for place in engines) else "127.0.0.1"
        return (_Out, chosen, address), (_In, chosen)


class _Group:
    """A process group of its own: rank 0 is the trainer's, the others are the engines."""

    def __init__(self, backend: str, store: Any, rank: int, size: int, *, seconds: float, local: bool) -> None:
        self.store = store
        timeout = datetime.timedelta(seconds=seconds)
        if backend == "nccl":
            self.inner: Any = dist.ProcessGroupNCCL(store, rank, size, _nccl_options(timeout))
        else:
            self.inner = dist.ProcessGroupGloo(store, rank, size, _gloo_options(timeout, local=local))

    def broadcast(self, buffer: Tensor) -> Any:
        """Start a broadcast from rank 0."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        return self.inner.broadcast([buffer], options)

    def close(self) -> None:
        """Leave it; a broadcast under way fails."""
        self.inner = None
        self.store = None


def _gloo_options(timeout: datetime.timedelta, *, local: bool) -> Any:
    options = dist.ProcessGroupGloo._Options()
    make = dist.ProcessGroupGloo.create_device
    options._devices = [make(hostname="127.0.0.1") if local else dist.ProcessGroupGloo.create_default_device()]
    options._timeout = timeout
    return options


def _nccl_options(timeout: datetime.timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return options


def _wait(work: Any, deadline: Deadline, peer: str, device: torch.device) -> None:
    """Wait for a broadcast.

    Raises:
        DeadlineExceeded: It took too long.
        PeerGaveUp: It broke.
    """
    try:
        work.wait(datetime.timedelta(seconds=max(deadline.left, 0.001)))
    except RuntimeError as error:
        if deadline.left == 0:
            raise deadline.passed(peer) from error
        raise PeerGaveUp(f"the broadcast with {peer} broke: {error}") from error
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Buffers:
    """Two buffers that grow to the largest chunk."""

    def __init__(self) -> None:
        self.tensors: list[Tensor | None] = [None] * _NUM_SLOTS

    def slot(self, number: int, num_bytes: int, least: int, device: torch.device) -> Tensor:
        """The first `num_bytes` of the buffer that chunk `number` goes through."""
        found = self.tensors[number % _NUM_SLOTS]
        if found is None or found.numel() < num_bytes or found.device != device:
            found = torch.empty(max(num_bytes, least), dtype=torch.uint8, device=device)
            self.tensors[number % _NUM_SLOTS] = found
        return found[:num_bytes]


class _Out:
    num_bytes_sent = None

    def __init__(self, transfer: Transfer, backend: Any, kind: str, address: str) -> None:
        self.transfer, self.kind, self.address = transfer, kind, address
        self.device = torch.device(backend.device if kind == "nccl" else "cpu")
        self.buffers: _Buffers = keep(("out buffers", transfer.session), _Buffers)
        self.works: list[Any] = [None] * _NUM_SLOTS

    def begin(self, hub: Hub, num_engines: int) -> None:
        """Join the engines in a group: the one of the last refit if they are the same."""
        key = ("out group", self.transfer.session)
        members = [(wire.hello["process"], wire.hello["group"]) for wire in hub.wires]
        known: _Membership | None = keep(key, _Membership)
        assert known is not None
        if known.group is None or known.members != [(process, known.name) for process, _ in members]:
            forget(key)
            known = keep(key, _Membership)
            known.start(self.kind, self.address, hub, self.transfer)
            known.members = [(process, known.name) for process, _ in members]
        else:
            hub.tell(("group", known.name, None))
        self.group = known.group

    def send(self, hub: Hub, number: int, chunk: Chunk) -> None:
        slot = number % _NUM_SLOTS
        deadline = hub.wires[0].deadline
        if self.works[slot] is not None:
            _wait(self.works[slot], deadline, "the engines", self.device)
        buffer = self.buffers.slot(number, chunk.num_bytes, self.transfer.chunk_bytes, self.device)
        pack(chunk, buffer)
        hub.tell(("chunk", number, chunk.num_bytes, chunk.entries))
        self.works[slot] = self.group.broadcast(buffer)

    def end(self, digest: str) -> None:
        pass


class _Membership:
    """The trainer's group and who is in it."""

    _count = 0

    def __init__(self) -> None:
        self.members: list[Any] = []
        self.name = ""
        self.group: Any = None

    def start(self, kind: str, address: str, hub: Hub, transfer: Transfer) -> None:
        """Make the group together with the engines."""
        _Membership._count += 1
        self.name = f"{PROCESS}-{_Membership._count}"
        seconds = transfer.timeout_s
        store = dist.TCPStore(
            address,
            0,
            is_master=True,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=max(1.0, seconds)),
        )
        size = len(hub.wires) + 1
        for rank, wire in enumerate(hub.wires, start=1):
            wire.send(("group", self.name, (address, store.port, rank, size)))
        self.group = _Group(kind, store, 0, size, seconds=seconds, local=address == "127.0.0.1")

    def close(self) -> None:
        if self.group is not None:
            self.group.close()


class _In:
    def __init__(self, transfer: Transfer, engine: Any, kind: str) -> None:
        self.transfer, self.kind = transfer, kind
        self.device = torch.device(str(engine.device) if kind == "nccl" else "cpu")
        self.buffers: _Buffers = keep(("in buffers", transfer.session), _Buffers)
        self.joined: dict[str, Any] = keep(("in group", transfer.session), dict)
        self.posted: dict[int, tuple[Tensor, Any]] = {}

    def hello(self) -> dict[str, Any]:
        return {"process": PROCESS, "group": next(iter(self.joined), None)}

    def begin(self, wire: Wire) -> None:
        _, name, fresh = wire.receive()
        if fresh is not None:
            for group in self.joined.values():
                group.close()
            self.joined.clear()
            address, port, rank, size = fresh
            seconds = self.transfer.timeout_s
            timeout = datetime.timedelta(seconds=max(1.0, seconds))
            store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
            local = address == "127.0.0.1"
            self.joined[name] = _Group(self.kind, store, rank, size, seconds=seconds, local=local)
        self.group = self.joined[name]

    def take(self, wire: Wire, message: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
        number = message[1]
        buffer, work = self.posted.pop(number, None) or self._post(message)
        _wait(work, wire.deadline, "the trainer", self.device)
        for name, tensor in unpack(message[3], buffer):
            following = wire.peek()  # let the next chunk come while this one is loaded
            if following is not None and following[0] == "chunk" and following[1] not in self.posted:
                self.posted[following[1]] = self._post(following)
            yield name, tensor
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _post(self, message: Sequence[Any]) -> tuple[Tensor, Any]:
        _, number, num_bytes, _ = message
        buffer = self.buffers.slot(number, num_bytes, self.transfer.chunk_bytes, self.device)
        return buffer, self.group.broadcast(buffer)

    def end(self, digest: str) -> None:
        pass
