"""The virtual cluster: which devices of which machine each worker of each role has.

A *pool* is a set of devices, held by placement groups with one bundle per machine. Colocated roles draw on one pool,
from its first device on; otherwise each role of `cluster.roles` has a pool of its own. Consecutive ranks stand on the
same machine, so that tensor-parallel peers do.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Literal

import ray
from attrs import define, field, frozen
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nemo_rl_core.errors import ResourceError

if TYPE_CHECKING:
    from nemo_rl_core.config.schema import ClusterConfig

__all__ = ["Seat", "VirtualCluster"]


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


@frozen
class _Slot:
    """One device: a GPU, or a share of the cores."""

    group: Any
    bundle: int
    gpu: str | None


@define
class _Pool:
    """Devices by machine."""

    slots: dict[str, list[_Slot]] = field(factory=dict)


class VirtualCluster:
    """Single source of truth for which role runs where. Ray must be connected.

    Args:
        cluster: What the run asks for.
        placement_timeout_s: How long to wait for what others use.

    Raises:
        ResourceError: The cluster does not have what `cluster` asks for.
    """

    def __init__(self, cluster: ClusterConfig, *, placement_timeout_s: float) -> None:
        self.cluster = cluster
        self.placement_timeout_s = placement_timeout_s
        self.nodes: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]
        gpus = [int(node["Resources"].get("GPU", 0)) for node in self.nodes]
        self.device: Literal["cpu", "cuda"] = _choose_device(cluster, max(gpus, default=0))
        self.capacity = self._capacity()
        self._pools: dict[str, _Pool] = {}
        self._turn = threading.Lock()
        """Held while a pool may grow: engines are placed by several threads."""
        self._groups: list[Any] = []
        if cluster.num_nodes > len(self.nodes):
            raise ResourceError(
                f"cluster.num_nodes is {cluster.num_nodes}; the Ray cluster has {len(self.nodes)} node(s):\n"
                f"{self._listing()}\nLower it, or start Ray on more machines (`ray start --address=HEAD:PORT`)."
            )

    @property
    def unit(self) -> str:
        """Ray's name of the resource that a device is."""
        return "GPU" if self.device == "cuda" else "CPU"

    def place(
        self, role: str, *, num_workers: int, devices_per_worker: int = 1, replica: int = 0, num_replicas: int = 1
    ) -> list[Seat]:
        """Seats of the workers of `role`, by rank, or of those of one of its `num_replicas` equal groups.

        The same replica has the same seats when it is started again.

        Raises:
            ResourceError: More is asked for than the cluster, or the role's share, has; or others use it.
        """
        per_worker = devices_per_worker if self.device == "cuda" else 1
        num_all = num_workers * num_replicas
        share = self._share(role, num_all * per_worker)
        num_nodes = self.cluster.num_nodes
        if share is not None:  # a role of its own devices takes as few machines as they fill
            num_nodes = min(num_nodes, -(-share // self.capacity))
        workers_per_node = -(-num_all // num_nodes)
        if workers_per_node * per_worker > self.capacity:
            what = "GPU" if self.device == "cuda" else "CPU core"
            raise ResourceError(
                f"Role {role!r} asks for {num_all} workers of {per_worker} {what}(s) on {num_nodes} node(s), which "
                f"is {workers_per_node * per_worker} for each; a node has {self.capacity} for the run. The cluster:\n"
                f"{self._listing()}\nLower {role}.num_workers, raise cluster.num_nodes, or set cluster."
                f"{'gpus' if self.device == 'cuda' else 'cpus'}_per_node if a node has more."
            )
        with self._turn:
            pool = self._pools.setdefault(role if share is not None else "", _Pool())
            nodes = self._reserve(pool, role, -(-num_all // workers_per_node), workers_per_node * per_worker)
        num_threads = self._threads(num_all, workers_per_node, share)
        first = replica * num_workers
        seats: list[Seat] = []
        for number in range(first, first + num_workers):
            node_id, place = nodes[number // workers_per_node], number % workers_per_node
            taken = pool.slots[node_id][place * per_worker : (place + 1) * per_worker]
            before = max(first, number - place)  # the first of this group on that machine
            seats.append(self._seat(node_id, number - before, taken, num_threads))
        return seats

    def release(self) -> None:
        """Give everything back."""
        groups, self._groups = self._groups, []
        self._pools.clear()
        for group in groups:
            remove_placement_group(group)

    # -- sizes ----------------------------------------------------------------------------------

    def _capacity(self) -> int:
        """Devices of one machine that the run may use."""
        found = sorted((int(n["Resources"].get(self.unit, 0)) for n in self.nodes), reverse=True)
        have = min(found[: self.cluster.num_nodes], default=0)
        asked = self.cluster.gpus_per_node if self.device == "cuda" else self.cluster.cpus_per_node
        if asked is not None and asked > have:
            name = f"cluster.{'gpus' if self.device == 'cuda' else 'cpus'}_per_node"
            raise ResourceError(
                f"{name} is {asked}; Ray has these nodes:\n{self._listing()}\nLower it, or start Ray with more "
                f"(`ray start --num-{self.unit.lower()}s`)."
            )
        return have if asked is None else asked

    def _share(self, role: str, wanted: int) -> int | None:
        """Devices of a role that has its own; None if the roles share."""
        if self.cluster.colocated or not self.cluster.roles:
            return None
        if role not in self.cluster.roles:
            raise ResourceError(
                f"cluster.colocated is false and cluster.roles has no {role!r} (it has: "
                f"{', '.join(self.cluster.roles)}). Add `{role}: {wanted}`, or set cluster.colocated: true."
            )
        share = self.cluster.roles[role]
        if wanted > share:
            raise ResourceError(
                f"Role {role!r} asks for {wanted} devices; cluster.roles.{role} is {share}. Lower its workers or give "
                "the role more devices."
            )
        asked, total = sum(self.cluster.roles.values()), self.capacity * self.cluster.num_nodes
        if asked > total:
            raise ResourceError(
                f"cluster.roles asks for {asked} devices in all ({dict(self.cluster.roles)}); the cluster has {total} "
                f"for the run:\n{self._listing()}\nLower a role, or raise cluster.num_nodes."
            )
        return share

    def _listing(self) -> str:
        rows = []
        for node in self.nodes:
            has = node["Resources"]
            rows.append(f"  {node['NodeManagerHostname']}: {has.get('CPU', 0):g} CPU, {has.get('GPU', 0):g} GPU")
        return "\n".join(rows) or "  (no node is alive)"

    # -- placement groups -----------------------------------------------------------------------

    def _reserve(self, pool: _Pool, role: str, num_nodes: int, per_node: int) -> list[str]:
        """Make sure that the pool has `per_node` devices on `num_nodes` machines; which ones, in order."""
        for node_id, slots in list(pool.slots.items())[:num_nodes]:
            if len(slots) < per_node:
                self._add(pool, role, 1, per_node - len(slots), on=node_id)
        if len(pool.slots) < num_nodes:
            self._add(pool, role, num_nodes - len(pool.slots), per_node)
        return list(pool.slots)[:num_nodes]

    def _add(self, pool: _Pool, role: str, num_bundles: int, size: int, on: str | None = None) -> None:
        bundle = {"CPU": size, **({"GPU": size} if self.device == "cuda" else {})}
        choose: dict[str, Any] = {} if on is None else {"bundle_label_selector": [{"ray.io/node-id": on}] * num_bundles}
        strategy = "STRICT_SPREAD" if num_bundles > 1 else "PACK"
        group = placement_group([bundle] * num_bundles, strategy=strategy, **choose)
        self._groups.append(group)
        if not group.wait(self.placement_timeout_s):
            free = ray.available_resources()
            raise ResourceError(
                f"No place for role {role!r} in {self.placement_timeout_s:g} s: it needs {num_bundles} x {bundle} "
                f"(each on one node); free in the whole cluster: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} "
                f"GPU. Other jobs use the rest (`ray status`), or the machines are too small:\n{self._listing()}\n"
                "Wait, ask for less, or raise cluster.options.placement_timeout_s."
            )
        nodes = placement_group_table(group)["bundles_to_node_id"]
        for index in range(num_bundles):
            gpus = _gpus_of(group, index, size) if self.device == "cuda" else [None] * size
            pool.slots.setdefault(nodes[index], []).extend(_Slot(group, index, gpu) for gpu in gpus)

    def _threads(self, num_workers: int, workers_per_node: int, share: int | None) -> int | None:
        """CPU threads of one worker; None leaves the default of a lone process."""
        if self.device == "cuda" or (num_workers == 1 and share is None):
            return None
        in_use = workers_per_node if share is None else min(self.capacity, sum(self.cluster.roles.values()))
        return max(1, self.capacity // in_use)

    def _seat(self, node_id: str, local_rank: int, slots: list[_Slot], num_threads: int | None) -> Seat:
        gpus = tuple(slot.gpu for slot in slots if slot.gpu is not None)
        return Seat(
            strategy=PlacementGroupSchedulingStrategy(
                slots[0].group, slots[0].bundle, placement_group_capture_child_tasks=False
            ),
            node_id=node_id,
            host=next(str(n["NodeManagerHostname"]) for n in self.nodes if n["NodeID"] == node_id),
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


def _gpus_of(group: Any, bundle: int, size: int) -> list[str]:
    """Ids of the GPUs of a bundle on their machine."""
    where = PlacementGroupSchedulingStrategy(group, bundle)
    asked = _ask_gpus.options(num_cpus=0, num_gpus=size, scheduling_strategy=where).remote()
    found: list[str] = ray.get(asked, timeout=60.0)
    return found
