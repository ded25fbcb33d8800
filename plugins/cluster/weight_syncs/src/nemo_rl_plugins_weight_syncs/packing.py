"""Tensors packed into byte buffers, and seen again in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from attrs import define, field, frozen
from torch import Tensor

__all__ = ["Chunk", "Entry", "as_bytes", "chunks", "pack", "unpack"]

_ALIGNMENT = 64


@frozen
class Entry:
    """One tensor in a buffer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@define
class Chunk:
    """Tensors that lie in one buffer."""

    entries: list[Entry] = field(factory=list)
    tensors: list[Tensor] = field(factory=list)
    num_bytes: int = 0
    """Of the buffer, gaps for alignment included."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Put a tensor [...] behind the others."""
        offset = -(-self.num_bytes // _ALIGNMENT) * _ALIGNMENT
        self.entries.append(Entry(name, tensor.dtype, tuple(tensor.shape), offset, tensor.nbytes))
        self.tensors.append(tensor)
        self.num_bytes = offset + tensor.nbytes


def chunks(tensors: Iterable[tuple[str, Tensor]], chunk_bytes: int) -> Iterator[Chunk]:
    """Yield tensors [...] in the order in which they come, as many together as fit; one that is larger goes alone."""
    chunk = Chunk()
    for name, tensor in tensors:
        if chunk.entries and chunk.num_bytes + _ALIGNMENT + tensor.nbytes > chunk_bytes:
            yield chunk
            chunk = Chunk()
        chunk.add(name, tensor)
    if chunk.entries:
        yield chunk


def pack(chunk: Chunk, buffer: Tensor) -> None:
    """Copy a chunk's tensors into a buffer of bytes [num_bytes], on whatever device that is."""
    for entry, tensor in zip(chunk.entries, chunk.tensors, strict=True):
        _view(buffer, entry).copy_(tensor, non_blocking=True)


def unpack(entries: Sequence[Entry], buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors [...] in a buffer of bytes [num_bytes], as views of it."""
    for entry in entries:
        yield entry.name, _view(buffer, entry)


def _view(buffer: Tensor, entry: Entry) -> Tensor:
    return buffer[entry.offset : entry.offset + entry.num_bytes].view(entry.dtype).view(entry.shape)


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes [num_bytes], without a copy if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
