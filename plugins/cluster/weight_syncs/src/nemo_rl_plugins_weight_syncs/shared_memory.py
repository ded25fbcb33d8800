"""The weight sync `shared_memory`: a few buffers that the trainer fills and the engines read, on one machine.

On a CPU the buffers are memory that both sides map. An engine on the CUDA device of one of the trainer's ranks is
served by that rank, from device memory that it opens through CUDA IPC: no byte leaves the device.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.machine.place import Place
from nemo_rl_core.machine.shared_files import SharedFile, map_shared
from nemo_rl_plugins_weight_syncs.base import StreamedSync
from nemo_rl_plugins_weight_syncs.config import SharedMemoryConfig
from nemo_rl_plugins_weight_syncs.hub import PROCESS, Hub, Wire
from nemo_rl_plugins_weight_syncs.packing import Chunk, pack, unpack
from nemo_rl_plugins_weight_syncs.session_cache import keep
from nemo_rl_plugins_weight_syncs.streaming import Transfer

__all__ = ["SharedMemorySync"]

_NUM_SLOTS = 4
"""With two, each side waits for the other at every chunk; a few small ones let both run, and stay in the caches."""
_FIX = f"Lower weight_sync.options.chunk_bytes: {_NUM_SLOTS} buffers of it are held at once."


class SharedMemorySync(StreamedSync):
    """Weights through memory that trainer and engines share (CUDA IPC on one CUDA device)."""

    config_class: ClassVar[type] = SharedMemoryConfig

    def routes(self, trainers: Mapping[int, Place], engines: Sequence[Place]) -> dict[int, tuple[int, ...]]:
        """To each engine the rank on its CUDA device; where there is none, the first rank on its machine.

        Raises:
            ConfigError: On the machine of an engine there is no rank that has whole tensors.
        """
        routes: dict[int, tuple[int, ...]] = {}
        elsewhere = set()
        for number, engine in enumerate(engines):
            rank = _nearest(trainers, engine)
            if rank is None:
                elsewhere.add(engine.host)
            else:
                routes[rank] = (*routes.get(rank, ()), number)
        if elsewhere:
            hosts = sorted({place.host for place in trainers.values()})
            raise ConfigError(
                f"weight_sync: shared_memory needs trainer and engines on one machine; the trainer is on "
                f"{', '.join(hosts)}, engines on {', '.join(sorted(elsewhere))}. Set weight_sync: collective, delta or "
                "disk."
            )
        return routes

    def carriers(self, trainer: Place, engines: list[Place], transfer: Transfer) -> tuple[tuple[Any, ...], ...]:
        """Device memory if all are on one CUDA device, else the machine's."""
        one_device = bool(trainer.device_id) and all(place.device_id == trainer.device_id for place in engines)
        return (_Out, one_device), (_In,)


def _nearest(trainers: Mapping[int, Place], engine: Place) -> int | None:
    here = [rank for rank, place in sorted(trainers.items()) if place.machine == engine.machine]
    beside = [rank for rank in here if engine.device_id and trainers[rank].device_id == engine.device_id]
    return next(iter(beside or here), None)


class _Slots:
    """The trainer's buffers, kept from refit to refit as long as the same engines take part."""

    def __init__(self) -> None:
        self.engines: set[str] = set()
        self.buffers: list[_Buffer | None] = [None] * _NUM_SLOTS

    def serve(self, engines: set[str]) -> None:
        """An engine that is new cannot open what was unlinked: it gets fresh buffers."""
        if not engines <= self.engines:
            self.close()
        self.engines = engines

    def buffer(self, slot: int, num_bytes: int, least: int, device: str) -> _Buffer:
        """A buffer of at least `num_bytes`."""
        buffer = self.buffers[slot]
        if buffer is None or buffer.tensor.numel() < num_bytes or buffer.device != device:
            if buffer is not None:
                buffer.close()
            buffer = self.buffers[slot] = _Buffer(max(num_bytes, least), device)
        return buffer

    def close(self) -> None:
        for buffer in self.buffers:
            if buffer is not None:
                buffer.close()
        self.buffers = [None] * _NUM_SLOTS


class _Buffer:
    """Bytes that other processes can open by a handle."""

    def __init__(self, num_bytes: int, device: str) -> None:
        self.device = device
        self.file: SharedFile | None = None
        if device == "cpu":
            self.file = SharedFile(num_bytes, fix=_FIX)
            self.tensor = self.file.map()
            self.handle: Any = ("file", self.file.path, num_bytes)
        else:
            from torch.multiprocessing.reductions import reduce_tensor

            self.tensor = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self.handle = ("cuda", pickle.dumps(reduce_tensor(self.tensor)))

    def opened(self) -> None:
        """Every engine has opened it: its name is not needed any more, and cannot be left behind."""
        if self.file is not None:
            self.file.close()
            self.file = None

    def close(self) -> None:
        self.opened()


def _open(handle: Sequence[Any]) -> Tensor:
    """Return the buffer of bytes [num_bytes] that a handle leads to."""
    if handle[0] == "file":
        return map_shared(handle[1], handle[2])
    rebuild, args = pickle.loads(handle[1])
    opened: Tensor = rebuild(*args)
    return opened


class _Out:
    num_bytes_sent = None
    in_flight = _NUM_SLOTS

    def __init__(self, transfer: Transfer, device: str, one_device: bool) -> None:
        self.transfer = transfer
        self.device = device if one_device else "cpu"
        self.slots: _Slots = keep(transfer.key("slots"), _Slots)

    def begin(self, hub: Hub, num_engines: int) -> None:
        self.slots.serve({wire.hello["process"] for wire in hub.wires})

    def send(self, hub: Hub, number: int, chunk: Chunk) -> None:
        slot = number % _NUM_SLOTS
        if number >= _NUM_SLOTS:  # what lies there was taken, so it was opened as well
            self._opened(slot)
        buffer = self.slots.buffer(slot, chunk.num_bytes, self.transfer.chunk_bytes, self.device)
        pack(chunk, buffer.tensor)
        if self.device != "cpu":
            torch.cuda.current_stream(self.device).synchronize()
        hub.tell(("chunk", number, slot, buffer.handle, chunk.entries))

    def _opened(self, slot: int) -> None:
        buffer = self.slots.buffers[slot]
        if buffer is not None:
            buffer.opened()

    def end(self, digest: str) -> None:
        for slot in range(_NUM_SLOTS):
            self._opened(slot)


class _In:
    def __init__(self, transfer: Transfer, device: str) -> None:
        self.opened: dict[int, tuple[Any, Tensor]] = keep(transfer.key("opened"), dict)

    def hello(self) -> dict[str, Any]:
        return {"process": PROCESS}

    def begin(self, wire: Wire) -> None:
        pass

    def take(self, wire: Wire, message: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors [...] of a chunk, as views of the shared buffer."""
        _, _, slot, handle, entries = message
        known = self.opened.get(slot)
        if known is None or known[0] != handle:
            known = self.opened[slot] = (handle, _open(handle))
        yield from unpack(entries, known[1])
        if known[1].is_cuda:
            torch.cuda.synchronize(known[1].device)

    def end(self, digest: str) -> None:
        pass
