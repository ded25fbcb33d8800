"""The trainer's side of a refit: its tensors in the engine's dtype, in chunks, with their digest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nemo_rl_core.infra.fingerprint import Fingerprint

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Export"]


class Export:
    """Takes named tensors from a trainer as they come, casts, counts and digests them.

    Args:
        source: What `export_weights` yields.
        dtype: The engine's; None keeps each tensor's own.
    """

    def __init__(self, source: Iterator[tuple[str, Tensor]], dtype: Any) -> None:
        self._source = source
        self._dtype = dtype
        self._digest = Fingerprint()
        self._num_tensors = 0
        self._num_bytes = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self

    def __next__(self) -> tuple[str, Tensor]:
        name, tensor = next(self._source)
        out = tensor.detach()
        if self._dtype is not None and out.is_floating_point() and out.dtype != self._dtype:
            out = out.to(self._dtype)
        self._digest.add(name, out)
        self._num_tensors += 1
        self._num_bytes += out.numel() * out.element_size()
        return name, out

    def take(self, chunk: list[tuple[str, Tensor]], num_bytes: int) -> dict[str, Any]:
        """Append tensors to `chunk` until it holds `num_bytes`; what there is to know so far."""
        stop_at = self._num_bytes + num_bytes
        for item in self:
            chunk.append(item)
            if self._num_bytes >= stop_at:
                return {"last": False, "num_tensors": self._num_tensors}
        return {
            "last": True,
            "num_tensors": self._num_tensors,
            "num_bytes": self._num_bytes,
            "fingerprint": self._digest.hexdigest(),
        }
