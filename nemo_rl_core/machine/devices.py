"""Detection of this machine's devices."""

from __future__ import annotations

import ctypes.util
import os
from pathlib import Path
from typing import Literal

__all__ = ["detect_devices"]


def detect_devices() -> tuple[Literal["cpu", "cuda"], int]:
    """The device type to run on, and the number of CUDA devices on this machine (0 for "cpu")."""
    if not _has_cuda_driver():
        return "cpu", 0
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ("cuda", count) if count else ("cpu", 0)


def _has_cuda_driver() -> bool:
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        return False
    if Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists():
        return True
    if Path("/dev/dxg").exists():  # Windows subsystem for Linux
        return True
    return os.name == "nt" and ctypes.util.find_library("nvcuda") is not None
