"""Options of the weight syncs."""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen
from attrs.validators import ge, gt

__all__ = ["CollectiveConfig", "DeltaConfig", "DiskConfig", "SharedMemoryConfig"]


@frozen(kw_only=True)
class SharedMemoryConfig:
    """Options of `shared_memory`."""

    chunk_bytes: int = field(default=4 << 20, validator=gt(0))
    """Size of each of the four buffers that tensors are packed into; a larger tensor gets one of its own size."""
    check_fingerprint: bool = True
    """Compare the weights of both sides after each refit."""


@frozen(kw_only=True)
class CollectiveConfig:
    """Options of `collective`."""

    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """auto is NCCL where the trainer and every engine have a CUDA device of their own, else gloo."""
    chunk_bytes: int = field(default=64 << 20, validator=gt(0))
    """Size of each of the two buffers that are broadcast in turn; a larger tensor gets one of its own size."""
    check_fingerprint: bool = True
    """Compare the weights of both sides after each refit."""


@frozen(kw_only=True)
class DeltaConfig:
    """Options of `delta`."""

    chunk_bytes: int = field(default=16 << 20, validator=gt(0))
    """Bytes of changes that are sent at a time."""
    full_every: int = field(default=0, validator=ge(0))
    """Send all weights in every n-th refit; 0 only where an engine has no base to change."""
    check_fingerprint: bool = True
    """Compare the weights of both sides after each refit."""


@frozen(kw_only=True)
class DiskConfig:
    """Options of `disk`."""

    folder: str | None = None
    """Folder that trainer and engines see under this path; None is a temporary one, for engines on the trainer's
    machine."""
    shard_bytes: int = field(default=1 << 30, validator=gt(0))
    """Size of one safetensors file at most, unless a single tensor is larger."""
    keep: int = field(default=1, validator=ge(1))
    """Newest versions that stay on the disk during the run; after it none does."""
    check_fingerprint: bool = True
    """Compare the weights of both sides after each refit."""
