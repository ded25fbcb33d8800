"""What travels between the driver and the actors: cloudpickle, with tensors and arrays beside it as plain buffers.

Ray writes the buffers of a `Packet` straight into its object store and reads them there without a copy. Pickling is
by the user's `cloudpickle`, not the one inside Ray, so that what a script, a notebook or
`cloudpickle.register_pickle_by_value` means to send by value is sent by value.

Tensors arrive on the CPU, whatever device they were on.
"""

from __future__ import annotations

import functools
import io
import pickle
import sys
from collections import ChainMap
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
from attrs import frozen

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Packet", "decode", "encode"]

_IN_BAND_BYTES = 512


@frozen(slots=True)
class Packet:
    """A pickled value; Ray keeps the buffers apart."""

    header: bytes
    buffers: list[memoryview]

    @property
    def num_bytes(self) -> int:
        """Size of it all."""
        return len(self.header) + sum(buffer.nbytes for buffer in self.buffers)


def encode(value: object) -> Packet:
    """Pickle a value. Its buffers are those of its tensors and arrays: send it before they change."""
    buffers: list[Any] = []

    def take(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < _IN_BAND_BYTES:
            return True
        buffers.append(np.frombuffer(raw, dtype=np.uint8))
        return False

    stream = io.BytesIO()
    pickler_class = _pickler_class() if "torch" in sys.modules else cloudpickle.CloudPickler
    pickler_class(stream, protocol=5, buffer_callback=take).dump(value)
    return Packet(stream.getvalue(), buffers)


def decode(packet: Packet, *, copy: bool = True) -> Any:
    """The value of a packet.

    Args:
        packet: As it came.
        copy: Whether to copy tensors and arrays; without it they are in Ray's shared memory and must not be written to.
    """
    buffers = [bytearray(buffer) if copy else memoryview(buffer) for buffer in packet.buffers]
    return pickle.loads(packet.header, buffers=buffers)


@functools.cache
def _pickler_class() -> Any:
    """With our reduction of tensors. The table must stand on the class: the pickler reads it when it is made."""
    import torch

    table = ChainMap({torch.Tensor: _reduce_tensor}, cloudpickle.CloudPickler.dispatch_table)
    return type("_Pickler", (cloudpickle.CloudPickler,), {"dispatch_table": table})


def _reduce_tensor(tensor: Tensor) -> Any:
    """Return how to pickle a tensor [...]: its bytes out of band, its type and its shape."""
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        return tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    flat = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    data = pickle.PickleBuffer(array)
    return _make_tensor, (data, tensor.dtype, tuple(tensor.shape), tensor.requires_grad and tensor.is_leaf)


def _make_tensor(data: Any, dtype: Any, shape: tuple[int, ...], requires_grad: bool) -> Tensor:
    """Return the tensor [...] of these bytes, sharing their memory."""
    import torch

    if memoryview(data).nbytes == 0:
        made = torch.empty(shape, dtype=dtype)
    else:
        made = torch.frombuffer(data, dtype=dtype).reshape(shape)
    return made.requires_grad_() if requires_grad else made
