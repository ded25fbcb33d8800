"""A digest of a model's weights that is cheap enough to take after every refit.

The bits of each tensor are read as a matrix of 64-bit integers, of which every row and every column is
summed (modulo 2**64) in two passes at memory speed; the digest is a hash over names, shapes, dtypes and
these sums. One changed element changes a row's sum; two exchanged elements change two rows' sums or two
columns' sums. Only a change of four elements or more that cancels in rows and columns alike goes unseen, which
does not happen by accident.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Fingerprint", "fingerprint"]

_COLUMNS = 1024
_WORD = 8


class Fingerprint:
    """Digest of tensors that are seen one at a time; holds sums, not tensors."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, list[Tensor]]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in a named tensor, on the device that holds it."""
        self._entries.append((f"{name}|{tuple(tensor.shape)}|{tensor.dtype};", _sums(tensor.detach())))

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


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of named tensors; the order in which they come does not matter.

    Computed on the device that holds each tensor; only sums (1 word in 512 or fewer) are moved.

    Args:
        tensors: Name and tensor. Both sides of a comparison must use the same dtype and names.

    Returns:
        32 hexadecimal digits.
    """
    result = Fingerprint()
    for name, tensor in tensors:
        result.add(name, tensor)
    return result.hexdigest()


def _sums(tensor: Tensor) -> list[Tensor]:
    """Row sums, column sums and the unaligned tail of a tensor's bits, each a vector of 64-bit words."""
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
    """Sums modulo 2**64; NumPy's integer sums run at memory speed on a CPU, torch's do not."""
    import torch

    if body.device.type != "cpu":
        return [body.sum(dim=0), body.sum(dim=1)]
    words = body.numpy()
    return [torch.from_numpy(words.sum(axis=0)), torch.from_numpy(words.sum(axis=1))]
