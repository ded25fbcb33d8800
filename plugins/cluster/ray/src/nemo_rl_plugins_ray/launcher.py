"""The Ray launcher: every worker in an actor, seats by placement groups."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from typing import TYPE_CHECKING, Any, ClassVar

import ray
from attrs import evolve

from nemo_rl_core.errors import WorkerDied
from nemo_rl_core.infra.workers.remote import expected_plugins, log_folder, worker_environment
from nemo_rl_core.machine.place import ADDRESS_VARIABLE, is_loopback
from nemo_rl_core.protocols.launcher import WorkerContext, WorkerGroup, WorkerSpec
from nemo_rl_core.registry import check_nodes
from nemo_rl_plugins_ray.cluster import Connection, connect
from nemo_rl_plugins_ray.config import RayConfig
from nemo_rl_plugins_ray.group import RayWorkerGroup
from nemo_rl_plugins_ray.host import THREADS, WorkerHost
from nemo_rl_plugins_ray.members import Member, check_started
from nemo_rl_plugins_ray.placement import Seat, VirtualCluster

if TYPE_CHECKING:
    from nemo_rl_core.schema import ClusterConfig

__all__ = ["RayLauncher"]

_log = logging.getLogger(__name__)
_MAX_MOVES = 3


class _Moved(Exception):
    """A worker runs on another node than the one that it was prepared for."""


class RayLauncher:
    """Starts worker groups on a Ray cluster.

    Args:
        config: Options; None takes the defaults.
    """

    config_class: ClassVar[type] = RayConfig
    in_process: ClassVar[bool] = False

    def __init__(self, config: RayConfig | None = None) -> None:
        self.config = config or RayConfig()
        self._connection: Connection | None = None
        self._cluster: VirtualCluster | None = None
        self._groups: list[RayWorkerGroup] = []
        self._numbers = itertools.count()
        self._starting = 0
        self._changed = threading.Condition()

    def setup(self, cluster: ClusterConfig) -> None:
        """Connect to the cluster, or start one on this machine, and look at what it has.

        Raises:
            ResourceError: It does not answer, or does not have what `cluster` asks for.
        """
        self._connection = connect(self.config, cluster)
        try:
            self._cluster = VirtualCluster(cluster, placement_timeout_s=self.config.placement_timeout_s)
        except BaseException:
            self._connection.close()
            raise

    def launch(self, spec: WorkerSpec) -> WorkerGroup:
        """Start the workers of `spec` and run their `setup`. Several threads may call it at once.

        Raises:
            ResourceError: More devices are asked for than there are, or than are free in `placement_timeout_s`.
            PluginIncompatible: Workers lack a plugin or have another version; the message holds a table.
            WorkerDied: An actor ended during its start.
            DeadlineExceeded: A worker was not ready in `start_timeout_s`, the launcher's or that of `spec`.
        """
        with self._changed:
            cluster = self._cluster
            if cluster is None:
                raise RuntimeError("RayLauncher.launch() belongs between setup(cluster) and shutdown().")
            self._starting += 1
        try:
            return self._launch(spec, cluster)
        finally:
            with self._changed:
                self._starting -= 1
                self._changed.notify_all()

    def shutdown(self) -> None:
        """End every group, give their places back and leave the cluster; does nothing the second time.

        What other threads are starting is ended too, and these are waited for: a call to Ray that comes after its
        end would connect again.
        """
        with self._changed:
            cluster, self._cluster = self._cluster, None
            groups, self._groups = self._groups, []
        for group in reversed(groups):
            group.shutdown()
        limit = self.config.start_timeout_s
        with self._changed:
            if not self._changed.wait_for(lambda: not self._starting, limit):
                _log.warning("Workers that were being started have not ended in %g s.", limit)
        if cluster is not None and ray.is_initialized():
            cluster.release()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    # -- starting -------------------------------------------------------------------------------

    def _launch(self, spec: WorkerSpec, cluster: VirtualCluster) -> WorkerGroup:
        """Start the workers where they are to be; anew, if Ray has moved their place meanwhile as its node was lost."""
        for _ in range(_MAX_MOVES):
            try:
                return self._launch_once(spec, cluster)
            except _Moved as moved:
                _log.warning("%s", moved)
        raise WorkerDied(f"The {spec.label} workers did not start: their nodes were lost {_MAX_MOVES} times.")

    def _launch_once(self, spec: WorkerSpec, cluster: VirtualCluster) -> WorkerGroup:
        seats = cluster.place(
            spec.role,
            num_workers=spec.num_workers,
            devices_per_worker=spec.devices_per_worker,
            block=spec.block,
            replica=spec.replica,
            num_replicas=spec.num_replicas,
        )
        group = RayWorkerGroup(
            spec.label,
            [self._actor(spec, rank, seat) for rank, seat in enumerate(seats)],
            failure_grace_s=self.config.failure_grace_s,
            call_timeout_s=self.config.call_timeout_s,
        )
        with self._changed:
            self._groups = [*(known for known in self._groups if known.is_running), group]
            ended = self._cluster is None
        try:
            if ended:
                raise WorkerDied(f"The {spec.label} workers were not started: the run ends.")
            self._start(group, spec, seats)
        except BaseException:
            group.end("its start failed")
            raise
        return group

    def _actor(self, spec: WorkerSpec, rank: int, seat: Seat) -> Member:
        runtime_env = self.config.environment_of(spec.role, spec.env)
        actor_class: Any = ray.remote(num_cpus=0, max_restarts=0)(WorkerHost)
        actor = actor_class.options(
            scheduling_strategy=seat.strategy,
            name=f"nemo-rl/{os.getpid()}/{id(self):x}/{spec.label}/{rank}/{next(self._numbers)}",
            **({"runtime_env": runtime_env} if runtime_env else {}),
        ).remote()
        return Member(rank=rank, actor=actor, node_id=seat.node_id, host=seat.host)

    def _start(self, group: RayWorkerGroup, spec: WorkerSpec, seats: list[Seat]) -> None:
        """Compare plugins everywhere, agree on a rendezvous, and run `setup`."""
        limit = self.config.start_timeout_s
        folder, expected = log_folder(spec).absolute(), expected_plugins(spec)
        contexts = [_context(spec, rank, seat) for rank, seat in enumerate(seats)]
        addresses = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in ray.nodes()}
        variables = self.config.environment_of(spec.role, spec.env).get("env_vars", {})
        starts = {}
        for member, context, seat in zip(group.members, contexts, seats, strict=True):
            environment = _environment(spec, context, seat, addresses[seat.node_id], variables)
            log = folder / f"{spec.label}-rank{member.rank}.log"
            log.touch()  # so that an actor finds it if its machine sees this folder
            starts[member.rank] = member.actor.start.remote(environment, str(log), expected)
        answers = group.collect("start", starts, limit)
        check_started(spec.label, group.members, answers)
        for seat, answer in zip(seats, answers, strict=True):
            if answer["node"] != seat.node_id:
                raise _Moved(f"A {spec.label} worker that was to start on {seat.host} is on {answer['host']}.")
        for member, answer in zip(group.members, answers, strict=True):
            member.located(host=answer["host"], pid=answer["pid"], log=answer["log"])
        check_nodes([difference for answer in answers for difference in answer["differences"]])
        setups = {}
        for member, context in zip(group.members, contexts, strict=True):
            place = evolve(context, master_addr=addresses[seats[0].node_id], master_port=answers[0]["port"])
            setups[member.rank] = member.actor.setup.remote(_payload(spec, place))
        group.collect("setup", setups, max(limit, spec.start_timeout_s or 0.0))


def _context(spec: WorkerSpec, rank: int, seat: Seat) -> WorkerContext:
    return WorkerContext(
        role=spec.role,
        rank=rank,
        world_size=spec.num_workers,
        local_rank=seat.local_rank,
        device=seat.device,
        seed=spec.seed,
        run_dir=None if spec.run_dir is None else os.path.abspath(spec.run_dir),
        timeout_s=spec.timeout_s,
        num_threads=seat.num_threads,
        shares_device=spec.shares_device,
    )


def _environment(
    spec: WorkerSpec, context: WorkerContext, seat: Seat, address: str, variables: dict[str, str]
) -> dict[str, str]:
    """As for a process on this machine, also in its number of threads; `variables` are the runtime environment's."""
    environment = {} if is_loopback(address) else {ADDRESS_VARIABLE: address}
    environment |= {**worker_environment(spec, context), **variables}
    if THREADS not in environment and THREADS in os.environ:
        environment[THREADS] = os.environ[THREADS]
    if seat.visible_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(seat.visible_gpus)
    return environment


def _payload(spec: WorkerSpec, context: WorkerContext) -> bytes:
    import cloudpickle

    payload: bytes = cloudpickle.dumps((spec.factory, spec.config, context))
    return payload
