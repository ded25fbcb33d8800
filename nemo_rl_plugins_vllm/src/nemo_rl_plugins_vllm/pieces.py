"""New weights on their way to vLLM's processes: packed into pieces of memory that both sides can open.

A piece is one stretch of bytes with several tensors in it, and a list that says where each lies. On the CPU it is a
file in shared memory, a new one for each piece, so that the receiver may keep what it has not yet used; on a GPU it is
an allocation whose handle goes to the process on the same device, which takes a copy.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import define, field, frozen
from torch import Tensor

from nemo_rl_core.errors import GenerationError
from nemo_rl_core.machine.shared_files import SharedFile, map_shared

if TYPE_CHECKING:
    from torch import nn


__all__ = ["ExpectedWeights", "Piece", "open_piece", "pack"]

_ALIGNMENT = 64
_CPU = torch.device("cpu")
_SHOWN = 5
_Description = tuple[str, str, str, list[int], int]
"""What the trainer calls a tensor, what the model loads it as (the name by which a tied weight is known), its type and
shape, and where in the piece it begins (bytes)."""


@define
class Piece:
    """A full piece; `close` gives its memory back."""

    kind: Literal["file", "cuda"]
    where: Any
    """Path of the file, or the pickled handle and the device's identity."""
    num_bytes: int
    tensors: list[_Description]
    _held: Tensor | SharedFile | None = field(default=None, repr=False)

    def update_info(self) -> dict[str, Any]:
        """What the receiver is told."""
        return {"kind": self.kind, "where": self.where, "num_bytes": self.num_bytes, "tensors": self.tensors}

    def close(self) -> None:
        """Called when the receiver has answered; what it has mapped stays readable there."""
        held, self._held = self._held, None
        if isinstance(held, SharedFile):
            held.close()


@frozen
class ExpectedWeights:
    """Names and shapes of a model's weights."""

    shapes: Mapping[str, tuple[int, ...]]
    """By every name, also the further names of a tied weight."""
    canonical: Mapping[str, str]
    """The first name of each, which checkpoints use."""
    required: frozenset[str]
    """Canonical names of the parameters."""

    @classmethod
    def of(cls, model: nn.Module) -> ExpectedWeights:
        """Those of a Hugging Face module, which may be without contents (on the meta device)."""
        first: dict[int, str] = {}
        shapes, canonical = {}, {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            shapes[name] = tuple(parameter.shape)
            canonical[name] = first.setdefault(id(parameter), name)
        required = frozenset(canonical.values())
        for name, buffer in model.named_buffers():
            shapes[name], canonical[name] = tuple(buffer.shape), name
        return cls(shapes, canonical, required)

    def check(self, name: str, tensor: Tensor) -> str:
        """The name to load a tensor by.

        Raises:
            GenerationError: The model has none of this name or shape.
        """
        shape = self.shapes.get(name)
        if shape is None:
            raise GenerationError(
                f"Weight update: the model has no weight {name!r}. Its names look like "
                f"{sorted(self.required)[:_SHOWN]}. The trainer must export Hugging Face names of the same model."
            )
        if shape != tuple(tensor.shape):
            raise GenerationError(
                f"Weight update: {name!r} has shape {tuple(tensor.shape)}, the model needs {shape}. "
                "The trainer must export full tensors of the same model."
            )
        return self.canonical[name]

    def check_complete(self, seen: set[str]) -> None:
        """Refuse an update that has ended too early.

        Args:
            seen: Canonical names.

        Raises:
            GenerationError: Weights are missing.
        """
        missing = sorted(self.required - seen)
        if missing:
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise GenerationError(
                f"Weight update: {len(missing)} weights did not come: {missing[:_SHOWN]}{more}. "
                "The trainer must export every weight."
            )


def pack(
    tensors: Iterable[tuple[str, Tensor]], expected: ExpectedWeights | None, *, chunk_bytes: int, cuda_ipc: bool
) -> Iterator[Piece]:
    """Copy tensors into pieces, in the order in which they come; each before the next one is asked for.

    Args:
        tensors: Name and full tensor, valid until the next one is asked for.
        expected: What the model has; None checks nothing.
        chunk_bytes: Of one piece; a larger tensor has one of its own.
        cuda_ipc: Hand tensors of a GPU over on that GPU.

    Raises:
        GenerationError: A name or shape does not belong to the model, or, at the end, one is missing.
        ResourceError: Shared memory is too small for a piece.
    """
    filling: _Filling | None = None
    seen: set[str] = set()
    try:
        for name, tensor in tensors:
            load_name = expected.check(name, tensor) if expected else name
            seen.add(load_name)
            device = tensor.device if cuda_ipc and tensor.device.type == "cuda" else _CPU
            if filling is not None and not filling.takes(tensor, device):
                full, filling = filling, None
                yield full.piece()
            if filling is None:
                filling = _Filling(max(chunk_bytes, tensor.nbytes), device)
            filling.add(name, load_name, tensor)
        if expected:
            expected.check_complete(seen)
        if filling is not None:
            full, filling = filling, None
            yield full.piece()
    finally:
        if filling is not None:
            filling.discard()


class _Filling:
    """A piece that tensors are copied into, on the GPU `device` or in a file."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.device = device
        self.file: SharedFile | None = None
        self.tensors: list[_Description] = []
        self.end = 0
        if device == _CPU:
            self.file = SharedFile(
                capacity,
                fix="Lower generation.options.refit_chunk_mib: two pieces of it are held at once.",
                reserve=False,
            )
            self.buffer = self.file.map()
        else:
            self.buffer = torch.empty(capacity, dtype=torch.uint8, device=device)

    def takes(self, tensor: Tensor, device: torch.device) -> bool:
        """Whether there is room, and it is the right place."""
        return device == self.device and _aligned(self.end) + tensor.nbytes <= self.buffer.numel()

    def add(self, name: str, load_name: str, tensor: Tensor) -> None:
        """Copy a tensor behind the others."""
        offset, shape = _aligned(self.end), list(tensor.shape)
        if self.file is not None:
            self.file.reserve(offset, tensor.nbytes)
        _view(self.buffer, tensor.dtype, shape, offset).copy_(tensor.detach())
        self.tensors.append((name, load_name, str(tensor.dtype).removeprefix("torch."), shape, offset))
        self.end = offset + tensor.nbytes

    def piece(self) -> Piece:
        """As it is now."""
        if self.file is None:
            torch.cuda.synchronize(self.device)
            return Piece("cuda", _handle(self.buffer), self.end, self.tensors, self.buffer)
        return Piece("file", self.file.path, self.end, self.tensors, self.file)

    def discard(self) -> None:
        """Nobody gets it."""
        if self.file is not None:
            self.file.close()


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _view(buffer: Tensor, dtype: torch.dtype, shape: list[int], offset: int) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    return buffer[offset : offset + count * dtype.itemsize].view(dtype).view(shape)


def _handle(buffer: Tensor) -> tuple[bytes, str]:
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(buffer)
    return pickle.dumps(arguments), _identity(buffer.device)


def _identity(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def open_piece(
    kind: str, where: Any, num_bytes: int, tensors: list[Any], *, device: torch.device
) -> Iterator[tuple[str, str, Tensor]]:
    """In the receiver: name, name to load by, and tensor of all that a piece holds.

    Args:
        kind: As all that follow, of `Piece.update_info`.
        where: Path or handle.
        num_bytes: Of the piece.
        tensors: Descriptions.
        device: Of the receiver's model.

    Raises:
        RuntimeError: The piece lies on another GPU.
    """
    buffer = map_shared(where, max(num_bytes, 1)) if kind == "file" else _copied_from_gpu(where, device)
    for name, load_name, dtype, shape, offset in tensors:
        yield name, load_name, _view(buffer, getattr(torch, dtype), shape, offset)


def _copied_from_gpu(where: Any, device: torch.device) -> Tensor:
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    pickled, identity = where
    if _identity(device) != identity:
        raise RuntimeError(
            f"The trainer's weights are on the GPU {identity}, this worker is on {_identity(device)}. "
            "Set generation.options.weight_transport=shared_memory."
        )
    arguments = list(pickle.loads(pickled))
    arguments[6] = device.index or 0  # the device's number may be another one in this process
    copy: Tensor = rebuild_cuda_tensor(*arguments).clone()
    torch.cuda.synchronize(device)
    return copy
