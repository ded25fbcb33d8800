"""Place of a process: the processes with which it shares memory, and its address for the others."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
from pathlib import Path

from attrs import frozen

from nemo_rl_core.errors import ResourceError

__all__ = ["ADDRESS_VARIABLE", "Place", "find_place", "free_port", "gloo_interface", "is_loopback", "place_of"]

ADDRESS_VARIABLE = "NEMO_RL_ADDRESS"
"""Environment variable with the IP address by which other machines reach this process's. A launcher sets it where it
knows; who sets it for the workers decides."""
_LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915


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

    def address_between_machines(self) -> str:
        """`address`, for one who comes from another machine.

        Raises:
            ResourceError: It is one that only this machine reaches.
        """
        if is_loopback(self.address):
            raise ResourceError(
                f"Other machines cannot reach {self.host}: the only address that is known of it is {self.address}. Set "
                f"{ADDRESS_VARIABLE} to its IP address in the workers' environment there, or give the launcher that "
                "address (`ray start --node-ip-address=...`)."
            )
        return self.address


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


def place_of(worker: object) -> Place:
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
    """As the environment says; else that of the interface that leads to other machines (nothing is sent to find it)."""
    if told := os.environ.get(ADDRESS_VARIABLE):
        return told
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # an address that is reserved for documentation
        return str(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return _LOOPBACK


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an IP address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def gloo_interface(address: str) -> str | None:
    """The interface that gloo has to be told (GLOO_SOCKET_IFNAME) so that it gives its peers this address.

    Left to itself it gives them what the host name stands for, and that is a loopback address on many machines
    (/etc/hosts); None where it is not, or where the interface cannot be found.
    """
    try:
        if not address or is_loopback(address) or not is_loopback(socket.gethostbyname(socket.gethostname())):
            return None
    except OSError:
        return None
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == address), None)


def _address_of(interface: str) -> str | None:
    """The IPv4 address of a network interface (on Linux)."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()))
        return socket.inet_ntoa(found[20:24])
    except (ImportError, OSError):
        return None


def _device_id(device: str) -> str:
    if not device.startswith("cuda"):
        return ""
    import torch

    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
