"""Contract of a launcher: where the workers of each role run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from attrs import field, frozen

if TYPE_CHECKING:
    from nemo_rl_core.schema import ClusterConfig

__all__ = ["Launcher", "WorkerContext", "WorkerGroup", "WorkerSpec"]


@frozen(kw_only=True)
class WorkerContext:
    """What a worker knows of its place."""

    role: str = "policy"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: str = "cpu"
    """torch device string, such as "cpu" or "cuda:0"."""
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    """Rendezvous of `torch.distributed`; used when world_size > 1."""
    seed: int = 0
    run_dir: str | None = None
    timeout_s: float = 600.0
    """Deadline of one collective."""
    num_threads: int | None = None
    """CPU threads this worker may use; None leaves torch's default."""
    shares_device: bool = False
    """Workers of other roles hold memory on this device too."""


@frozen(kw_only=True)
class WorkerSpec:
    """A group of equal workers to start."""

    role: str
    factory: Any
    """`ComponentRef` of the class every worker makes (without arguments) and then calls `setup` on."""
    config: Any
    """First argument of `setup`."""
    num_workers: int = 1
    devices_per_worker: int = 1
    block: int = 1
    """So many consecutive workers must share a machine (tensor-parallel peers talk in every layer). A launcher of one
    machine may ignore it; one of several refuses what no machine has room for."""
    own_process: bool = False
    """Never in the driver's process, also if there is one worker only. A launcher that always starts processes may
    ignore it."""
    replica: int = 0
    """Which of `num_replicas` equal groups of the role this is (engines that serve side by side and die alone). It
    takes the devices after those of the replicas before it."""
    num_replicas: int = 1
    env: Mapping[str, str] = field(factory=dict)
    seed: int = 0
    run_dir: str | None = None
    timeout_s: float = 600.0
    start_timeout_s: float | None = None
    """Seconds that `setup` may take, where that is more than the launcher's own deadline of a start."""
    shares_device: bool = False
    """For `WorkerContext.shares_device`."""
    manifest: Sequence[Mapping[str, Any]] = ()
    """Rows (`nemo_rl_core.registry.manifest`) of the installed plugins that every worker must have too.

    A launcher that starts processes lets each compare them first thing, before anything heavy is imported
    (`node_differences`), and raises what `check_nodes` makes of all answers."""

    @property
    def label(self) -> str:
        """Name of this group in messages and of its logs: the role, with the replica's number if there are several."""
        return self.role if self.num_replicas == 1 else f"{self.role}-{self.replica}"


@runtime_checkable
class WorkerGroup(Protocol):
    """Running workers of one role, ranks 0 to size - 1."""

    size: int

    @property
    def local(self) -> Any | None:
        """The worker object itself if it lives in this process (then tensors can be shared), else None."""
        ...

    def call(self, method: str, /, *args: Any, timeout_s: float | None = None, **kwargs: Any) -> list[Any]:
        """Call `method` on every worker with the same arguments; results in rank order.

        Raises:
            DeadlineExceeded: Names the ranks that did not answer.
            WorkerDied: Names the rank, its exit status and the tail of its standard error.
            Exception: What a worker raised, with its rank in the message.
        """
        ...

    def call_each(
        self, method: str, arguments: Sequence[tuple[Any, ...]], /, *, timeout_s: float | None = None
    ) -> list[Any]:
        """Call `method` on worker r with the positional arguments `arguments[r]`."""
        ...

    def call_sharded(
        self,
        method: str,
        shards: Sequence[tuple[Any, ...]],
        /,
        *,
        axes: Mapping[str, int],
        over: str | Sequence[str] = "dp",
        timeout_s: float | None = None,
    ) -> list[Any]:
        """Call `method` on every worker, sharded over some axes and replicated over the others.

        With `axes={"dp": 4, "tp": 2}` and `over="dp"` ranks 0 and 1 get `shards[0]`, 2 and 3 `shards[1]`, and so on
        (`nemo_rl_core.infra.workers.axes.dispatch`). An argument that is the same object in every shard should be sent
        only once to where several workers read it.

        Returns:
            One result for each shard, of the lowest rank that has it. Those of its peers are not sent: these are
            only waited for.

        Raises:
            ValueError: There are not as many shards as places on the axes, or the axes do not fit the group.
            Exception: As `call`, also for what a rank raised whose result is not taken.
        """
        ...

    def iterate(self, method: str, /, *args: Any, timeout_s: float | None = None) -> Any:
        """Call a generator method on every worker; yield what rank 0 yields, one item at a time."""
        ...

    def check_alive(self) -> None:
        """Notice a worker that died while nobody called it.

        Returns at once, also while another thread calls the workers (who then notices it itself), and is asked every
        few seconds: a death may be told by a later call of it only. A worker that is busy is alive.

        Raises:
            WorkerDied: As `call` raises it; the group is then ended.
        """
        ...

    def shutdown(self) -> None:
        """Call `shutdown` on the workers and end their processes; may be called twice."""
        ...


@runtime_checkable
class Launcher(Protocol):
    """Starts worker groups. A component of group `nemo_rl.launchers`, made with the cluster's config.

    Attributes:
        config_class: attrs class of `cluster.options` for this launcher.
        in_process: False if no worker ever lives in the driver's process (`WorkerGroup.local` is None). May be left
            out: a lone worker then lives there unless its spec says `own_process`.
    """

    config_class: ClassVar[type]

    def setup(self, cluster: ClusterConfig) -> None:
        """Connect to or describe the machines.

        Raises:
            ResourceError: The machines do not have what `cluster` asks for.
        """
        ...

    def launch(self, spec: WorkerSpec) -> WorkerGroup:
        """Start the workers of `spec` and run `setup` on each; returns when all are ready.

        Several threads may call it at once, also during the run: an engine that died is started again so.
        """
        ...

    def shutdown(self) -> None:
        """End every group that is still running."""
        ...
