"""Storage of tensors on the host, so that another process may use their device meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from attrs import frozen
from torch import Tensor

from nemo_rl_core.errors import InvariantViolation

__all__ = ["HostMemory"]


_SLAB_BYTES = 64 << 20
"""Pinned memory is allocated in powers of two: storages of any size are laid out one after another in slabs of one."""


@frozen(eq=False)
class _Kept:
    storage: torch.UntypedStorage
    num_bytes: int
    start: int | None
    """Where its copy begins in the slabs; None for what comes back as zeros."""


class HostMemory:
    """Gives the memory of tensors back to their device, and restores it.

    It is the storages that are emptied and filled again. The tensor objects stay, and with them every view, tied
    weight, flat buffer and reference that an optimizer or a wrapper holds. In between the tensors must not be read:
    `check_here` stands before what reads them. The host's memory is kept for the next time.

    Args:
        constant: What the tensors hold never changes: it is copied to the host once.
        slab_bytes: The host's memory is taken in pieces of this size.
    """

    def __init__(self, *, constant: bool = False, slab_bytes: int = _SLAB_BYTES) -> None:
        self._constant = constant
        self._slab_bytes = slab_bytes
        self._slabs: list[Tensor] = []
        self._end = 0
        self._away: list[_Kept] = []
        self._known: dict[int, _Kept] = {}

    @property
    def is_away(self) -> bool:
        """Whether tensors wait on the host."""
        return bool(self._away)

    def check_here(self, what: str) -> None:
        """Refuse to go on while the tensors of `what` are away.

        Raises:
            InvariantViolation: They are.
        """
        if self._away:
            raise InvariantViolation(f"{what} waits in the host's memory since offload(). Call reload() first.")

    def offload(self, tensors: Iterable[Tensor], *, zeros: Iterable[Tensor] = ()) -> int:
        """Empty the tensors' storages, unless they are empty already.

        Args:
            tensors: Tensors of one device, of any shape [...]; several may share memory.
            zeros: Tensors whose values nobody needs: they come back as zeros.

        Returns:
            Bytes given back.
        """
        if self._away:
            return 0
        if not self._constant:
            self._end = 0
        copied = {storage._cdata: storage for storage in _storages(tensors)}
        kept = [self._keep(storage, copied=True) for storage in copied.values()]
        kept += [self._keep(s, copied=False) for s in _storages(zeros) if s._cdata not in copied]
        _synchronize(kept)
        for one in kept:
            self._away.append(one)
            one.storage.resize_(0)
        if any(one.storage.device.type == "cuda" for one in kept):
            torch.cuda.empty_cache()
        return sum(one.num_bytes for one in kept)

    def reload(self) -> None:
        """Fill the storages again; if one finds no room, the next call continues there."""
        kept = list(self._away)
        while self._away:
            one = self._away[-1]
            if one.storage.nbytes() != one.num_bytes:
                one.storage.resize_(one.num_bytes)
            self._fill(one)
            self._away.pop()
        _synchronize(kept)

    def _keep(self, storage: torch.UntypedStorage, *, copied: bool) -> _Kept:
        known = self._known.get(storage._cdata)
        if known is not None:
            return known
        one = _Kept(storage, storage.nbytes(), self._end if copied else None)
        if one.start is not None:
            self._end += one.num_bytes
            for on_host, on_device in self._pieces(one):
                on_host.copy_(on_device, non_blocking=True)
        if self._constant:
            self._known[storage._cdata] = one
        return one

    def _fill(self, one: _Kept) -> None:
        if one.start is None:
            _bytes(one.storage).zero_()
            return
        for on_host, on_device in self._pieces(one):
            on_device.copy_(on_host, non_blocking=True)

    def _pieces(self, one: _Kept) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a storage and its copy as pairs of bytes [num_bytes] (host, device), cut where a slab ends."""
        assert one.start is not None
        data, done, size = _bytes(one.storage), 0, self._slab_bytes
        while done < one.num_bytes:
            number, offset = divmod(one.start + done, size)
            while number >= len(self._slabs):
                self._slabs.append(torch.empty(size, dtype=torch.uint8, pin_memory=data.device.type == "cuda"))
            count = min(size - offset, one.num_bytes - done)
            yield self._slabs[number][offset : offset + count], data[done : done + count]
            done += count


def _storages(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    """Yield each storage of tensors [...] once, without those that cannot be emptied, such as a mapped file."""
    seen = set()
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # this rank's part of a DTensor
        storage = local.detach().untyped_storage()
        if storage._cdata in seen or not storage.nbytes() or not storage.resizable():
            continue
        seen.add(storage._cdata)
        yield storage


def _synchronize(kept: Iterable[_Kept]) -> None:
    """Wait for the copies under way."""
    for device in {one.storage.device for one in kept if one.storage.device.type == "cuda"}:
        torch.cuda.synchronize(device)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """The storage as a vector of bytes."""
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),), (1,))
