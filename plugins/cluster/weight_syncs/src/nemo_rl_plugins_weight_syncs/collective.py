"""The weight sync `collective`: packed chunks, broadcast from the trainer's rank 0 to every engine.

The group that they are broadcast in is one of its own (gloo or NCCL), beside whatever groups the trainer and the
engines have among themselves; it is made at the first refit and again when an engine was replaced.
"""

from __future__ import annotations

import ctypes
import datetime
import itertools
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.machine.place import Place, find_place
from nemo_rl_plugins_weight_syncs.base import StreamedSync
from nemo_rl_plugins_weight_syncs.config import CollectiveConfig
from nemo_rl_plugins_weight_syncs.hub import PROCESS, Hub, PeerGaveUp, RefitDeadline, Wire
from nemo_rl_plugins_weight_syncs.packing import Chunk, pack, unpack
from nemo_rl_plugins_weight_syncs.session_cache import forget, keep
from nemo_rl_plugins_weight_syncs.streaming import Transfer

__all__ = ["CollectiveSync"]

_NUM_SLOTS = 2
_LOOPBACK = "127.0.0.1"
_WATCHDOG = datetime.timedelta(days=1)
"""After which NCCL ends the process. Every wait here has the refit's deadline, and what is left then is aborted."""


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
        apart = any(place.machine != trainer.machine for place in engines)
        address = trainer.address_between_machines() if apart else _LOOPBACK
        return (_Out, chosen, address), (_In, chosen)


class _Group:
    """A process group of its own: rank 0 is the trainer's, the others are the engines."""

    def __init__(self, kind: str, store: dist.Store, rank: int, size: int, *, timeout: Any, local: bool) -> None:
        self.kind = kind
        self.store: dist.Store | None = store
        self.broadcasts: deque[_Broadcast] = deque(maxlen=_NUM_SLOTS)
        self.inner: Any = _nccl(store, rank, size) if kind == "nccl" else _gloo(store, rank, size, timeout, local=local)

    def broadcast(self, buffer: Tensor) -> _Broadcast:
        """Start a broadcast of a buffer of bytes [num_bytes] from rank 0."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        started = _Broadcast(self.kind, self.inner, buffer, options)
        self.broadcasts.append(started)
        return started

    def close(self) -> None:
        """Leave it.

        A broadcast may still be under way, because the other side gave up. NCCL's is aborted: its kernel would stay
        on the device, and NCCL's watchdog end this process. A gloo group is left to the end of the process: its
        destructor would wait for that broadcast until the group's deadline, and nothing can end it.
        """
        if not all(started.work.is_completed() for started in self.broadcasts):
            if self.kind == "nccl":
                self.inner.abort()
            else:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.inner))
        self.inner = None
        self.store = None


def _gloo(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta, *, local: bool) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, _gloo_options(timeout, local=local))


def _gloo_options(timeout: datetime.timedelta, *, local: bool) -> Any:
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    make = dist.ProcessGroupGloo.create_device
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if local:
        device = make(hostname=_LOOPBACK)
    elif interface:
        device = make(interface=interface)
    else:  # not what the host name stands for, which is a loopback address on many machines
        device = make(hostname=find_place().address)
    options._devices = [device]
    options._timeout = timeout
    return options


def _nccl(store: dist.Store, rank: int, size: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _WATCHDOG
    return dist.ProcessGroupNCCL(store, rank, size, options)


class _Broadcast:
    """One that was started."""

    def __init__(self, kind: str, group: dist.ProcessGroup, buffer: Tensor, options: Any) -> None:
        self.kind = kind
        self.device = buffer.device
        self.started = time.monotonic()
        self.work = group.broadcast([buffer], options)

    def wait(self, deadline: RefitDeadline, peer: str) -> None:
        """Wait until the buffer may be read, or written again.

        Raises:
            DeadlineExceeded: It took too long.
            PeerGaveUp: It broke.
        """
        seconds = max(deadline.remaining(), 0.001)
        if self.kind == "nccl":  # which counts from the start
            seconds += time.monotonic() - self.started
        try:
            self.work.wait(datetime.timedelta(seconds=seconds))
        except RuntimeError as error:
            if deadline.remaining() == 0:
                raise deadline.exceeded(peer) from error
            raise PeerGaveUp(f"the broadcast with {peer} broke: {error}") from error
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Buffers:
    """Two buffers that grow to the largest chunk."""

    def __init__(self) -> None:
        self.tensors: list[Tensor | None] = [None] * _NUM_SLOTS

    def slot(self, number: int, num_bytes: int, least: int, device: torch.device) -> Tensor:
        """Return the first bytes [num_bytes] of the buffer that chunk `number` goes through."""
        buffer = self.tensors[number % _NUM_SLOTS]
        if buffer is None or buffer.numel() < num_bytes or buffer.device != device:
            buffer = torch.empty(max(num_bytes, least), dtype=torch.uint8, device=device)
            self.tensors[number % _NUM_SLOTS] = buffer
        return buffer[:num_bytes]


class _Out:
    num_bytes_sent = None
    in_flight = _NUM_SLOTS

    def __init__(self, transfer: Transfer, device: str, kind: str, address: str) -> None:
        self.transfer, self.kind, self.address = transfer, kind, address
        self.device = torch.device(device if kind == "nccl" else "cpu")
        self.buffers: _Buffers = keep(transfer.key("out buffers"), _Buffers)
        self.started: list[_Broadcast | None] = [None] * _NUM_SLOTS

    def begin(self, hub: Hub, num_engines: int) -> None:
        """Join the engines in a group: the one of the last refit if they are the same."""
        key = self.transfer.key("out group")
        members = [wire.hello["process"] for wire in hub.wires]
        known: _Joined = keep(key, _Joined)
        if known.group is None or known.members != members or any(w.hello["group"] != known.name for w in hub.wires):
            forget(key)
            known = keep(key, _Joined)
            known.make(self.kind, self.address, hub, self.transfer)
            known.members = members
        else:
            hub.tell(("group", known.name, None))
        assert known.group is not None
        self.group = known.group

    def send(self, hub: Hub, number: int, chunk: Chunk) -> None:
        slot = number % _NUM_SLOTS
        deadline = hub.wires[0].deadline
        before = self.started[slot]
        if before is not None:
            before.wait(deadline, "the engines")
        buffer = self.buffers.slot(number, chunk.num_bytes, self.transfer.chunk_bytes, self.device)
        pack(chunk, buffer)
        hub.tell(("chunk", number, chunk.num_bytes, chunk.entries))
        self.started[slot] = self.group.broadcast(buffer)

    def end(self, digest: str) -> None:
        pass


class _Joined:
    """A group of this session and, on the trainer's side, who is in it."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.name: str | None = None
        self.members: list[str] = []
        self.group: _Group | None = None
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def make(self, kind: str, address: str, hub: Hub, transfer: Transfer) -> None:
        """On the trainer's side: make a group together with the engines."""
        self.name = f"{PROCESS}-{next(_Joined._numbers)}"
        size = len(hub.wires) + 1
        where: str | tuple[str, int]
        if address == _LOOPBACK:
            self.folder = tempfile.TemporaryDirectory(prefix="nemo-rl-collective-")
            where = str(Path(self.folder.name) / "store")
            store: Any = dist.FileStore(where, size)
        else:
            store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=_timeout(transfer))
            where = (address, store.port)
        for rank, wire in enumerate(hub.wires, start=1):
            wire.send(("group", self.name, (where, rank, size)))
        self.group = _Group(kind, store, 0, size, timeout=_timeout(transfer), local=isinstance(where, str))

    def enter(self, kind: str, name: str, where: Any, rank: int, size: int, *, transfer: Transfer) -> None:
        """On an engine's side: enter the group that the trainer makes."""
        self.name = name
        if isinstance(where, str):
            store: Any = dist.FileStore(where, size)
        else:
            host, port = where
            store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_timeout(transfer))
        self.group = _Group(kind, store, rank, size, timeout=_timeout(transfer), local=isinstance(where, str))

    def close(self) -> None:
        if self.group is not None:
            self.group.close()
        if self.folder is not None:
            self.folder.cleanup()


def _timeout(transfer: Transfer) -> datetime.timedelta:
    return datetime.timedelta(seconds=max(1.0, transfer.timeout_s))


class _In:
    def __init__(self, transfer: Transfer, device: str, kind: str) -> None:
        self.transfer, self.kind = transfer, kind
        self.device = torch.device(device if kind == "nccl" else "cpu")
        self.buffers: _Buffers = keep(transfer.key("in buffers"), _Buffers)
        self.joined: _Joined = keep(transfer.key("in group"), _Joined)
        self.posted: dict[int, tuple[Tensor, _Broadcast]] = {}

    def hello(self) -> dict[str, Any]:
        return {"process": PROCESS, "group": self.joined.name}

    def begin(self, wire: Wire) -> None:
        _, name, fresh = wire.receive()
        if fresh is not None:
            key = self.transfer.key("in group")
            forget(key)
            self.joined = keep(key, _Joined)
            self.joined.enter(self.kind, name, *fresh, transfer=self.transfer)
        assert self.joined.group is not None
        self.group = self.joined.group

    def take(self, wire: Wire, message: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors [...] of a chunk once its broadcast has come."""
        number = message[1]
        buffer, started = self.posted.pop(number) if number in self.posted else self._post(message)
        started.wait(wire.deadline, "the trainer")
        for name, tensor in unpack(message[3], buffer):
            following = wire.peek()  # let the next chunk come while this one is loaded
            if following is not None and following[0] == "chunk" and following[1] not in self.posted:
                self.posted[following[1]] = self._post(following)
            yield name, tensor
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _post(self, message: Sequence[Any]) -> tuple[Tensor, _Broadcast]:
        _, number, num_bytes, _ = message
        buffer = self.buffers.slot(number, num_bytes, self.transfer.chunk_bytes, self.device)
        return buffer, self.group.broadcast(buffer)

    def end(self, digest: str) -> None:
        pass
