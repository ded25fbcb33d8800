"""Where a process is: which others it shares memory with, and how those elsewhere reach it."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

from attrs import frozen

__all__ = ["Place", "find_place", "free_port", "place_of"]


@frozen(kw_only=True)
class Place:
    """One process's place."""

    machine: str
    """Equal for processes that see one another's files and sockets: the booted machine and its namespaces."""
    host: str
    """Name of the machine, for messages."""
    address: str
    """IP address by which other machines reach it."""
    device: str = "cpu"
    """torch device string."""
    device_id: str = ""
    """UUID of a CUDA device; empty on a CPU."""


def find_place(device: str = "cpu") -> Place:
    """The place of this process."""
    host = socket.gethostname()
    return Place(
        machine=":".join([_read("/proc/sys/kernel/random/boot_id") or host, *(_namespace(n) for n in ("mnt", "net"))]),
        host=host,
        address=_address(),
        device=device,
        device_id=_device_id(device),
    )


def place_of(worker: Any) -> Place:
    """The place of the process that `worker` lives in; its device is that of its weights."""
    found = getattr(worker, "device", None)
    return find_place("cpu" if found is None else str(found))


def free_port(address: str = "127.0.0.1") -> int:
    """A port of this machine that nobody listens on; with the address "" on none of its interfaces."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="ascii").strip()
    return ""


def _namespace(name: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/ns/{name}")
    return ""


def _address() -> str:
    """The address of the interface that leads to other machines; nothing is sent to find it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # an address that is reserved for documentation
        return str(probe.getsockname()[0])
    return "127.0.0.1"


def _device_id(device: str) -> str:
    if not device.startswith("cuda"):
        return ""
    import torch

    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
