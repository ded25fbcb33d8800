"""Tensors whose memory waits on the host, so that another process may use their device meanwhile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from attrs import frozen
from torch import Tensor

from nemo_rl_core.errors import InvariantViolation

__all__ = ["HostMemory"]


@frozen(eq=False)
class _Kept:
    storage: torch.UntypedStorage
    num_bytes: int
    copy: Tensor | None
    """On the host; None for what comes back as zeros."""


class HostMemory:
    """Gives the memory of tensors back to their device, and restores it.

    It is the storages that are emptied and filled again. The tensor objects stay, and with them every view, tied
    weight, flat buffer and reference that an optimizer or a wrapper holds. In between the tensors must not be read:
    `check_here` stands before what reads them.

    Args:
        constant: What the tensors hold never changes: it is copied to the host once.
    """

    def __init__(self, *, constant: bool = False) -> None:
        self._constant = constant
        self._away: list[_Kept] = []
        self._known: dict[int, _Kept] = {}
        self._spare: dict[int, list[Tensor]] = defaultdict(list)

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
        """Empty the tensors' storages; nothing if they are empty already.

        Args:
            tensors: Of one device; several may share memory.
            zeros: Tensors whose values nobody needs: they come back as zeros.

        Returns:
            Bytes given back.
        """
        if self._away:
            return 0
        forgotten = {storage._cdata for storage in _storages(zeros)}
        kept = [self._keep(s, copied=s._cdata not in forgotten) for s in _storages([*tensors, *zeros])]
        on_cuda = any(one.storage.device.type == "cuda" for one in kept)
        if on_cuda:
            torch.cuda.synchronize()  # the copies are under way
        self._spare.clear()
        for one in kept:
            self._away.append(one)
            one.storage.resize_(0)
        if on_cuda:
            torch.cuda.empty_cache()
        return sum(one.num_bytes for one in kept)

    def reload(self) -> None:
        """Fill the storages again; what has found no room yet is tried again at the next call."""
        on_cuda = any(one.storage.device.type == "cuda" for one in self._away)
        while self._away:
            one = self._away[-1]
            if one.storage.nbytes() != one.num_bytes:
                one.storage.resize_(one.num_bytes)
            if one.copy is None:
                _bytes(one.storage).zero_()
            else:
                _bytes(one.storage).copy_(one.copy, non_blocking=True)
            self._away.pop()
            if self._constant:
                self._known[one.storage._cdata] = one
            elif one.copy is not None:
                self._spare[one.num_bytes].append(one.copy)  # memory that is pinned already
        if on_cuda:
            torch.cuda.synchronize()

    def _keep(self, storage: torch.UntypedStorage, *, copied: bool) -> _Kept:
        known = self._known.get(storage._cdata)
        if known is not None:
            return known
        num_bytes = storage.nbytes()
        if not copied:
            return _Kept(storage, num_bytes, None)
        spare = self._spare[num_bytes]
        pinned = storage.device.type == "cuda"
        copy = spare.pop() if spare else torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        copy.copy_(_bytes(storage), non_blocking=True)
        return _Kept(storage, num_bytes, copy)


def _storages(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    """Each storage once. One that cannot be emptied is memory of the host, such as a mapped file."""
    seen = set()
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # this rank's part of a DTensor
        storage = local.detach().untyped_storage()
        if storage._cdata in seen or not storage.nbytes() or not storage.resizable():
            continue
        seen.add(storage._cdata)
        yield storage


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """The storage as a vector of bytes."""
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),), (1,))
