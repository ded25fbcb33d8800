"""Digest of a model's weights that is cheap enough to take after every refit.

The bits of each tensor are read as a matrix of 64-bit integers, of which every row and every column is
summed (modulo 2**64) in one pass through the memory; the digest is a hash over names, shapes, dtypes and
these sums. One changed element changes a row's sum; two exchanged elements change two rows' sums or two
columns' sums. Only a change of four elements or more that cancels in rows and columns alike goes unseen, which
does not happen by accident.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["CachedSums", "Fingerprint", "fingerprint"]

_COLUMNS = 1024
_ROWS_IN_CACHE = 128
"""Rows that are summed both ways before the next ones are read: 1 MiB."""
_WORD = 8


class Fingerprint:
    """Digest of tensors that are seen one at a time; holds sums, not tensors."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, list[Tensor]]] = []

    def add(self, name: str, tensor: Tensor, sums: list[Tensor] | None = None) -> None:
        """Take in a named tensor of any shape [...], on the device that holds it.

        Args:
            name: Name of the tensor.
            tensor: Its values.
            sums: Its sums, each [num_words], if they are known already.
        """
        entry_sums = _sums(tensor.detach()) if sums is None else sums
        self._entries.append((f"{name}|{tuple(tensor.shape)}|{tensor.dtype};", entry_sums))

    def hexdigest(self) -> str:
        """32 hexadecimal digits; the order of the calls of `add` does not matter."""
        import torch

        entries = sorted(self._entries, key=lambda entry: entry[0])
        digest = hashlib.blake2b("".join(header for header, _ in entries).encode(), digest_size=16)
        pieces = [piece for _, parts in entries for piece in parts]
        if len({piece.device for piece in pieces}) == 1:  # one transfer for all
            pieces = [torch.cat(pieces)]
        for piece in pieces:
            digest.update(piece.cpu().numpy().tobytes())
        return digest.hexdigest()


class CachedSums:
    """Sums of an engine's weights, taken when each was loaded and still in the CPU's caches, for a digest later.

    The digest is that of the current tensors: one that has changed is summed again. A change is seen by torch's counter
    (`Tensor._version`) or by a move to other memory. A write past that counter (through `.data` or from outside torch)
    is not seen, so code that does so makes a new object.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[_State, list[Tensor]]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in a weight of any shape [...] that was just written."""
        state = _state(tensor)
        if state is not None:
            self._sums[name] = state, _sums(tensor.detach())

    def fingerprint(self, tensors: Iterable[tuple[str, Tensor]]) -> str:
        """Digest of named tensors of any shape [...], as the function `fingerprint` gives it."""
        result = Fingerprint()
        for name, tensor in tensors:
            state, sums = self._sums.get(name, (None, []))
            result.add(name, tensor, sums if state is not None and state == _state(tensor) else None)
        return result.hexdigest()


_State = tuple[int, int, "torch.device", "torch.dtype", "torch.Size", tuple[int, ...]]
"""Counter of changes, address and layout of a tensor."""


def _state(tensor: Tensor) -> _State | None:
    """State of a tensor [...], different after any change that torch knows of; None where torch counts none."""
    if tensor.is_inference():
        return None
    return tensor._version, tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of named tensors; the order in which they come does not matter.

    Computed on the device that holds each tensor; only sums (1 word in 512 or fewer) are moved.

    Args:
        tensors: Name and tensor [...]. Both sides of a comparison must use the same dtype and names.

    Returns:
        32 hexadecimal digits.
    """
    result = Fingerprint()
    for name, tensor in tensors:
        result.add(name, tensor)
    return result.hexdigest()


def _sums(tensor: Tensor) -> list[Tensor]:
    """Row sums, column sums and the unaligned tail of a tensor's bits, each [num_words] of 64-bit words."""
    import torch

    flat = tensor.contiguous().reshape(-1)
    if flat.numel() == 0:
        return [torch.zeros(1, dtype=torch.int64, device=flat.device)]
    raw = flat.view(torch.uint8)
    if raw.storage_offset() % _WORD:  # a view that starts inside a word
        raw = raw.clone()
    num_words = raw.numel() // _WORD
    words = raw[: num_words * _WORD].view(torch.int64)
    tail = raw[num_words * _WORD :].to(torch.int64)
    num_rows = num_words // _COLUMNS
    body = words[: num_rows * _COLUMNS].view(num_rows, _COLUMNS)
    # A short tensor (or the last, incomplete row) is taken as it is.
    parts = [words[num_rows * _COLUMNS :], tail]
    if num_rows:
        parts += _row_and_column_sums(body)
    return parts


def _row_and_column_sums(body: Tensor) -> list[Tensor]:
    """Column sums [num_columns] and row sums [num_rows] of words [num_rows, num_columns], modulo 2**64.

    On a CPU NumPy's sums of columns and torch's of rows are the fast ones; the second finds in the caches what the
    first has read.
    """
    import torch

    if body.device.type != "cpu":
        return [body.sum(dim=0), body.sum(dim=1)]
    columns = torch.zeros(_COLUMNS, dtype=torch.int64)
    rows = torch.empty(len(body), dtype=torch.int64)
    into, words = columns.numpy(), body.numpy()
    for start in range(0, len(body), _ROWS_IN_CACHE):
        end = start + _ROWS_IN_CACHE
        into += words[start:end].sum(axis=0)
        torch.sum(body[start:end], dim=1, out=rows[start:end])
    return [columns, rows]
