"""Resources of this machine, and the role that each device serves.

Nothing here imports torch unless a CUDA driver is visible, so that reading a configuration stays cheap.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from attrs import frozen

from nemo_rl_core.errors import ConfigError, ResourceError
from nemo_rl_core.machine.devices import detect_devices

if TYPE_CHECKING:
    from nemo_rl_core.schema import ClusterConfig

__all__ = ["Placement", "ResourceManager", "check_role_names", "check_roles_fit", "role_share"]


@frozen(kw_only=True)
class Placement:
    """Where the workers of one role run on this machine."""

    role: str
    devices: tuple[str, ...]
    """torch device string of each worker's first device, by rank."""
    num_threads: int | None
    """CPU threads of each worker; None leaves the default of a lone process."""


class ResourceManager:
    """Single source of truth for which role runs where.

    Colocated roles share the machine's devices from the first one on; otherwise `cluster.roles` gives each
    role its own, in the order in which it lists them. On a CPU a "device" is a share of the cores.

    Args:
        cluster: The machines.

    Raises:
        ResourceError: The machine does not have what `cluster` asks for.
    """

    def __init__(self, cluster: ClusterConfig) -> None:
        found, num_found = detect_devices()
        self.cluster = cluster
        self.device: Literal["cpu", "cuda"] = _choose_device(cluster, found)
        self.num_cpus: int = cluster.cpus_per_node or os.cpu_count() or 1
        self.num_gpus: int = _count_gpus(cluster, num_found) if self.device == "cuda" else 0
        total, what = (self.num_gpus, "GPUs") if self.device == "cuda" else (self.num_cpus, "CPU cores")
        check_roles_fit(cluster, total, f"in {what} the machine has")

    def place(
        self, role: str, *, num_workers: int, devices_per_worker: int = 1, replica: int = 0, num_replicas: int = 1
    ) -> Placement:
        """Devices of the workers of `role`, or of one of its `num_replicas` equal groups.

        Raises:
            ResourceError: More is asked for than the machine, or the role's share, has.
        """
        num_all = num_workers * num_replicas
        wanted = num_all * (devices_per_worker if self.device == "cuda" else 1)
        first, share = self._share(role, wanted)
        if self.device == "cpu":
            if num_all > self.num_cpus:
                raise ResourceError(
                    f"Role {role!r} asks for {num_all} workers; this machine has {self.num_cpus} CPU cores. "
                    f"Lower {role}.num_workers, or set cluster.cpus_per_node if more can be used."
                )
            threads = None if num_all == 1 else max(1, self.num_cpus // num_all)
            return Placement(role=role, devices=("cpu",) * num_workers, num_threads=threads)
        if wanted > share:
            raise ResourceError(
                f"Role {role!r} asks for {wanted} GPUs ({num_all} workers of {devices_per_worker}); the machine has "
                f"{share}. Lower {role}.num_workers or give the role more devices."
            )
        before = first + replica * num_workers * devices_per_worker
        devices = tuple(f"cuda:{before + rank * devices_per_worker}" for rank in range(num_workers))
        return Placement(role=role, devices=devices, num_threads=None)

    def _share(self, role: str, wanted: int) -> tuple[int, int]:
        """First device and number of devices of a role."""
        share = role_share(self.cluster, role, wanted)
        if share is None:
            return 0, self.num_gpus if self.device == "cuda" else self.num_cpus
        names = list(self.cluster.roles)
        return sum(self.cluster.roles[name] for name in names[: names.index(role)]), share


def role_share(cluster: ClusterConfig, role: str, wanted: int) -> int | None:
    """Devices of a role that has its own (`cluster.roles`); None if the roles share.

    Args:
        cluster: The machines.
        role: Its name.
        wanted: Devices that its workers take.

    Raises:
        ResourceError: It has none, or more are wanted.
    """
    if cluster.colocated or not cluster.roles:
        return None
    if role not in cluster.roles:
        raise ResourceError(
            f"cluster.colocated is false and cluster.roles has no {role!r} (it has: {', '.join(cluster.roles)}). Add "
            f"`{role}: {wanted}`, or set cluster.colocated: true."
        )
    share = cluster.roles[role]
    if wanted > share:
        raise ResourceError(
            f"Role {role!r} asks for {wanted} devices; cluster.roles.{role} is {share}. Lower its workers or give the "
            "role more devices."
        )
    return share


def check_roles_fit(cluster: ClusterConfig, total: int, where: str) -> None:
    """Compare what all roles of `cluster.roles` take with the devices that there are.

    Raises:
        ResourceError: They take more.
    """
    asked = sum(cluster.roles.values())
    if not cluster.colocated and asked > total:
        raise ResourceError(
            f"cluster.roles asks for {asked} devices in all ({dict(cluster.roles)}); {where} {total} for the run. "
            "Lower a role, or let the run use more (cluster.num_nodes, cluster.gpus_per_node, cluster.cpus_per_node)."
        )


def check_role_names(cluster: ClusterConfig, roles: Sequence[str]) -> None:
    """Devices are for roles that there are.

    Raises:
        ConfigError: `cluster.roles` names another.
    """
    unknown = [] if cluster.colocated else [name for name in cluster.roles if name not in roles]
    if unknown:
        close = difflib.get_close_matches(unknown[0], roles, n=1)
        raise ConfigError(
            f"cluster.roles has {', '.join(unknown)}, which is no role of this run (it has: {', '.join(roles)}). "
            + (f"Did you mean {close[0]}?" if close else "Take it out.")
        )


def _choose_device(cluster: ClusterConfig, found: Literal["cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    if cluster.device == "cpu" or (cluster.device == "auto" and cluster.gpus_per_node == 0):
        return "cpu"
    if cluster.device == "cuda" and found == "cpu":
        raise ResourceError(
            "cluster.device is 'cuda', but no CUDA device is visible to this process. Set cluster.device: cpu, or "
            "check the driver (nvidia-smi), CUDA_VISIBLE_DEVICES and that torch is a CUDA build."
        )
    return found


def _count_gpus(cluster: ClusterConfig, found: int) -> int:
    if cluster.gpus_per_node is not None and cluster.gpus_per_node > found:
        raise ResourceError(
            f"cluster.gpus_per_node is {cluster.gpus_per_node}; {found} CUDA device(s) are visible to this process. "
            "Lower it, or leave it out to take what is found."
        )
    return found if cluster.gpus_per_node is None else cluster.gpus_per_node
