"""The virtual cluster: which devices of which machine each worker of each role has.

Devices are held by placement groups, machine by machine. Colocated roles use the same ones, from the first on, and
hold more when a role needs more. Otherwise the devices of all roles of `cluster.roles` are held at set-up, in one
placement group, so that two runs never wait for what the other has; a role takes whole machines first. Consecutive
ranks stand on the same machine, and those of a block (tensor-parallel peers) always do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import ray
from attrs import define, field, frozen
from ray._private.state import available_resources_per_node
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nemo_rl_core.errors import ResourceError
from nemo_rl_core.infra.workers.resources import check_roles_fit, role_share
from nemo_rl_core.machine.deadline import Deadline
from nemo_rl_plugins_ray.layout import fill, plan

if TYPE_CHECKING:
    from nemo_rl_core.schema import ClusterConfig

__all__ = ["Seat", "VirtualCluster"]

_NODE = "ray.io/node-id"
_LOOK_S = 0.2


@frozen(kw_only=True)
class Seat:
    """Where one worker sits."""

    strategy: Any
    """For `options(scheduling_strategy=...)`: its bundle."""
    node_id: str
    host: str
    local_rank: int
    device: str
    visible_gpus: tuple[str, ...]
    """Ids of its GPUs on its machine; empty on the CPU."""
    num_threads: int | None


@define
class _Bundle:
    """Devices of one machine that a placement group holds."""

    group: Any
    index: int
    size: int
    node_id: str
    gpus: list[str]
    """Ids of its GPUs there; empty on the CPU."""

    @property
    def strategy(self) -> Any:
        """For `options(scheduling_strategy=...)`."""
        return PlacementGroupSchedulingStrategy(self.group, self.index, placement_group_capture_child_tasks=False)


@define
class _Machine:
    """What is held of one machine: its devices are those of its bundles, in their order."""

    bundles: list[_Bundle] = field(factory=list)
    host: str = "?"

    @property
    def size(self) -> int:
        """Devices held."""
        return sum(bundle.size for bundle in self.bundles)

    @property
    def node_id(self) -> str:
        """Where it is."""
        return self.bundles[0].node_id

    def bundle_of(self, device: int) -> _Bundle:
        """The bundle of a device."""
        for bundle in self.bundles:
            if device < bundle.size:
                return bundle
            device -= bundle.size
        raise IndexError(device)

    def gpus(self, devices: Sequence[int]) -> tuple[str, ...]:
        """Ids of the GPUs of some devices; empty on the CPU."""
        all_gpus = [gpu for bundle in self.bundles for gpu in bundle.gpus]
        return tuple(all_gpus[device] for device in devices) if all_gpus else ()


@frozen
class _Spot:
    """The devices of one worker: a machine, by its place in the list, and which of its devices."""

    machine: int
    devices: Sequence[int]


class VirtualCluster:
    """Single source of truth for which role runs where. Ray must be connected.

    Args:
        cluster: What the run asks for.
        placement_timeout_s: How long to wait for what others use.

    Raises:
        ResourceError: The cluster does not have what `cluster` asks for, or others use it.
    """

    def __init__(self, cluster: ClusterConfig, *, placement_timeout_s: float) -> None:
        self.cluster = cluster
        self.placement_timeout_s = placement_timeout_s
        self.nodes: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]
        gpus = [int(node["Resources"].get("GPU", 0)) for node in self.nodes]
        self.device: Literal["cpu", "cuda"] = _choose_device(cluster, max(gpus, default=0))
        self.capacity = self._capacity()
        self._machines: list[_Machine] = []
        self._spots: dict[str, list[_Spot]] = {}
        """Of the roles that have devices of their own and were placed."""
        self._turn = threading.Lock()
        """Held while seats are given out: engines are placed by several threads."""
        self._groups: list[Any] = []
        if cluster.num_nodes > len(self.nodes):
            raise ResourceError(
                f"cluster.num_nodes is {cluster.num_nodes}; the Ray cluster has {len(self.nodes)} node(s):\n"
                f"{self._listing()}\nLower it, or start Ray on more machines (`ray start --address=HEAD:PORT`)."
            )
        if self._apart:
            self._hold_roles()

    @property
    def unit(self) -> str:
        """Ray's name of the resource that a device is."""
        return "GPU" if self.device == "cuda" else "CPU"

    def place(
        self,
        role: str,
        *,
        num_workers: int,
        devices_per_worker: int = 1,
        block: int = 1,
        replica: int = 0,
        num_replicas: int = 1,
    ) -> list[Seat]:
        """Seats of the workers of `role`, by rank, or of those of one of its `num_replicas` equal groups.

        The same replica has the same devices when it is started again, or where its machine was lost those that Ray
        has found instead.

        Args:
            role: Its name.
            num_workers: Of one group.
            devices_per_worker: GPUs of one worker; one on the CPU.
            block: So many consecutive workers share a machine.
            replica: Which of the groups.
            num_replicas: Groups of the role.

        Raises:
            ResourceError: More is asked for than the cluster, or the role's share, has; or others use it.
        """
        per_worker = devices_per_worker if self.device == "cuda" else 1
        num_all = num_workers * num_replicas
        if block * per_worker > self.capacity:
            raise ResourceError(
                f"Role {role!r} has {block} worker(s) of {per_worker} {self._what} that must share a machine; a "
                f"node has {self.capacity} for the run:\n{self._listing()}\nLower tensor_parallel_size of {role}, or "
                f"set cluster.{self.unit.lower()}s_per_node if a node has more."
            )
        share = role_share(self.cluster, role, num_all * per_worker)
        with self._turn:
            if share is None:
                spots = self._spread(role, num_all, per_worker, block)
            else:
                spots = self._take(role, num_all, per_worker, block)
            num_threads = self._threads(spots, share)
            own = spots[replica * num_workers : (replica + 1) * num_workers]
            for number in dict.fromkeys(spot.machine for spot in own):
                self._locate(role, self._machines[number])
            return [
                self._seat(spot, sum(spot.machine == other.machine for other in own[:rank]), num_threads)
                for rank, spot in enumerate(own)
            ]

    def release(self) -> None:
        """Give everything back."""
        groups, self._groups = self._groups, []
        self._machines.clear()
        self._spots.clear()
        for group in groups:
            remove_placement_group(group)

    # -- sizes ----------------------------------------------------------------------------------

    def _capacity(self) -> int:
        """Devices of one machine that the run may use."""
        units = sorted((int(n["Resources"].get(self.unit, 0)) for n in self.nodes), reverse=True)
        have = min(units[: self.cluster.num_nodes], default=0)
        asked = self.cluster.gpus_per_node if self.device == "cuda" else self.cluster.cpus_per_node
        if asked is not None and asked > have:
            name = f"cluster.{'gpus' if self.device == 'cuda' else 'cpus'}_per_node"
            raise ResourceError(
                f"{name} is {asked}; Ray has these nodes:\n{self._listing()}\nLower it, or start Ray with more "
                f"(`ray start --num-{self.unit.lower()}s`)."
            )
        return have if asked is None else asked

    @property
    def _apart(self) -> bool:
        """Whether roles have devices of their own."""
        return bool(self.cluster.roles) and not self.cluster.colocated

    @property
    def _what(self) -> str:
        return "GPU(s)" if self.device == "cuda" else "CPU core(s)"

    def _listing(self) -> str:
        rows = []
        for node in self.nodes:
            has = node["Resources"]
            rows.append(f"  {node['NodeManagerHostname']}: {has.get('CPU', 0):g} CPU, {has.get('GPU', 0):g} GPU")
        return "\n".join(rows) or "  (no node is alive)"

    # -- which devices --------------------------------------------------------------------------

    def _spread(self, role: str, num_all: int, per_worker: int, block: int) -> list[_Spot]:
        """Devices of a role that shares them: evenly on the machines, in whole blocks, from the first device on."""
        num_nodes = self.cluster.num_nodes
        per_node = -(-num_all // num_nodes)
        per_node = -(-per_node // block) * block
        if per_node * per_worker > self.capacity:
            raise ResourceError(
                f"Role {role!r} asks for {num_all} workers of {per_worker} {self._what} on {num_nodes} node(s), which "
                f"is {per_node * per_worker} for each; a node has {self.capacity} for the run. The cluster:\n"
                f"{self._listing()}\nLower {role}.num_workers, raise cluster.num_nodes, or set cluster."
                f"{self.unit.lower()}s_per_node if a node has more."
            )
        where = [divmod(number, per_node) for number in range(num_all)]
        self._grow(role, [sum(m == machine for m, _ in where) * per_worker for machine in range(where[-1][0] + 1)])
        return [_Spot(machine, range(place * per_worker, (place + 1) * per_worker)) for machine, place in where]

    def _take(self, role: str, num_all: int, per_worker: int, block: int) -> list[_Spot]:
        """Devices of a role that has its own, among those that are held for the roles."""
        known = self._spots.pop(role, [])
        if len(known) == num_all and all(len(spot.devices) == per_worker for spot in known):
            self._spots[role] = known
            return known
        used = {(s.machine, device) for spots in self._spots.values() for s in spots for device in s.devices}
        free = [[d for d in range(m.size) if (number, d) not in used] for number, m in enumerate(self._machines)]
        blocks = fill(-(-num_all // block), block * per_worker, [len(devices) for devices in free])
        if blocks is None:
            raise ResourceError(
                f"Role {role!r} asks for {num_all} workers of {per_worker} {self._what}, of which each {block} must "
                f"share a machine; of what cluster.roles holds, the machines have {[len(d) for d in free]} left. "
                f"Change tensor_parallel_size of {role}, or make cluster.roles {dict(self.cluster.roles)} fill "
                f"machines of {self.capacity}."
            )
        spots = []
        for machine, count in blocks.items():
            devices = free[machine]
            for place in range(0, count * block * per_worker, per_worker):
                spots.append(_Spot(machine, devices[place : place + per_worker]))
        self._spots[role] = spots[:num_all]
        return self._spots[role]

    # -- placement groups -----------------------------------------------------------------------

    def _hold_roles(self) -> None:
        """Hold the devices of all roles at once.

        Raises:
            ResourceError: There are not as many, or others use them.
        """
        roles, whole = self.cluster.roles, [self.capacity] * self.cluster.num_nodes
        check_roles_fit(self.cluster, sum(whole), f"with nodes\n{self._listing()}\nit has")
        wanted = plan(roles.values(), whole) or whole
        free = self._free()
        if any(have < need for have, need in zip(free, wanted, strict=False)):
            wanted = plan(roles.values(), free) or wanted  # what is free now, else wait for whole machines
        self._machines = self._hold(f"the roles {dict(roles)}", wanted)

    def _free(self) -> list[int]:
        """Devices that the run may use and nobody holds, of the `num_nodes` machines that have the most."""
        units = ("GPU", "CPU") if self.device == "cuda" else ("CPU",)
        nodes = available_resources_per_node().values()
        free = sorted((min(int(node.get(unit, 0)) for unit in units) for node in nodes), reverse=True)
        return [min(count, self.capacity) for count in free[: self.cluster.num_nodes]]

    def _grow(self, role: str, sizes: Sequence[int]) -> None:
        """Make sure that at least `sizes` devices are held of the machines."""
        for machine, size in zip(self._machines, sizes, strict=False):
            if machine.size < size:
                (more,) = self._hold(f"role {role!r}", [size - machine.size], where=machine.node_id)
                machine.bundles += more.bundles
        if missing := sizes[len(self._machines) :]:
            others = ",".join(machine.node_id for machine in self._machines)
            self._machines += self._hold(f"role {role!r}", missing, where=f"!in({others})" if others else None)

    def _hold(self, whom: str, sizes: Sequence[int], where: str | None = None) -> list[_Machine]:
        """Hold so many devices of as many machines.

        Args:
            whom: For whom, in messages.
            sizes: Devices by machine.
            where: Ray's label selector of the node ids.
        """
        bundles = [{"CPU": size, **({"GPU": size} if self.device == "cuda" else {})} for size in sizes]
        choose: dict[str, Any] = {} if where is None else {"bundle_label_selector": [{_NODE: where}] * len(sizes)}
        group = placement_group(bundles, strategy="STRICT_SPREAD" if len(sizes) > 1 else "PACK", **choose)
        if not group.wait(self.placement_timeout_s):
            remove_placement_group(group)
            free = ray.available_resources()
            raise ResourceError(
                f"No place for {whom} in {self.placement_timeout_s:g} s: needed are {bundles}, each on another node; "
                f"free in the whole cluster: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} "
                f"GPU. Other jobs use the rest (`ray status`), or the machines are too small:\n{self._listing()}\n"
                "Wait, ask for less, or raise cluster.options.placement_timeout_s."
            )
        self._groups.append(group)
        nodes = placement_group_table(group)["bundles_to_node_id"]
        return [
            _Machine([_Bundle(group, index, size, nodes[index], self._gpus_of(group, index, size))])
            for index, size in enumerate(sizes)
        ]

    def _locate(self, role: str, machine: _Machine) -> None:
        """Find out where the devices of a machine are now: Ray moves them to another node when theirs is lost.

        Raises:
            ResourceError: No other node has room for them in time.
        """
        first, deadline = machine.bundles[0], Deadline(self.placement_timeout_s)
        while True:
            table = placement_group_table(first.group)
            node_id = table["bundles_to_node_id"].get(first.index)
            alive = {node["NodeID"]: str(node["NodeManagerHostname"]) for node in ray.nodes() if node["Alive"]}
            if node_id in alive:
                break
            if table["state"] == "REMOVED" or deadline.expired:
                raise ResourceError(
                    f"The node {machine.host} of role {role!r} was lost, and no other had room for its {machine.size} "
                    f"{self._what} in {self.placement_timeout_s:g} s (cluster.options.placement_timeout_s). Start Ray "
                    "on another machine, or start the run again on what is left."
                )
            time.sleep(_LOOK_S)
        machine.host = alive[node_id]
        if node_id == first.node_id:
            return
        added, machine.bundles = machine.bundles[1:], [first]
        first.node_id, first.gpus = node_id, self._gpus_of(first.group, first.index, first.size)
        for bundle in added:  # these were bound to the node that was lost
            self._groups.remove(bundle.group)
            remove_placement_group(bundle.group)
        if added:
            (more,) = self._hold(f"role {role!r}", [sum(bundle.size for bundle in added)], where=node_id)
            machine.bundles += more.bundles

    def _gpus_of(self, group: Any, index: int, size: int) -> list[str]:
        """Ids of the GPUs of a bundle on their machine; none on the CPU."""
        if self.device == "cpu":
            return []
        where = PlacementGroupSchedulingStrategy(group, index)
        asked = _ask_gpus.options(num_cpus=0, num_gpus=size, scheduling_strategy=where).remote()
        gpus: list[str] = ray.get(asked, timeout=60.0)
        return gpus

    # -- seats ----------------------------------------------------------------------------------

    def _threads(self, spots: Sequence[_Spot], share: int | None) -> int | None:
        """CPU threads of one worker; None leaves the default of a lone process."""
        if self.device == "cuda" or (len(spots) == 1 and share is None):
            return None
        machines = [spot.machine for spot in spots]
        in_use = max(map(machines.count, machines)) if share is None else sum(self.cluster.roles.values())
        return max(1, self.capacity // min(self.capacity, in_use))

    def _seat(self, spot: _Spot, local_rank: int, num_threads: int | None) -> Seat:
        machine = self._machines[spot.machine]
        gpus = machine.gpus(spot.devices)
        return Seat(
            strategy=machine.bundle_of(spot.devices[0]).strategy,
            node_id=machine.node_id,
            host=machine.host,
            local_rank=local_rank,
            device="cuda:0" if gpus else "cpu",
            visible_gpus=gpus,
            num_threads=num_threads,
        )


def _choose_device(cluster: ClusterConfig, num_gpus: int) -> Literal["cpu", "cuda"]:
    if cluster.device == "cpu" or (cluster.device == "auto" and (cluster.gpus_per_node == 0 or not num_gpus)):
        return "cpu"
    if not num_gpus:
        raise ResourceError(
            "cluster.device is 'cuda', but no node of the Ray cluster has a GPU. Set cluster.device: cpu, or start Ray "
            "where nvidia-smi sees one."
        )
    return "cuda"


@ray.remote(max_retries=0)
def _ask_gpus() -> list[str]:
    return [str(gpu) for gpu in ray.get_gpu_ids()]
