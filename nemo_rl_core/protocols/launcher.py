"""Contract of a launcher: starts the workers of each role."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Concatenate,
    ParamSpec,
    Protocol,
    TypeVar,
    TypeVarTuple,
    Unpack,
    runtime_checkable,
)

from attrs import field, frozen

if TYPE_CHECKING:
    from nemo_rl_core.schema import ClusterConfig

__all__ = [
    "Launcher",
    "SupportsShutdown",
    "Worker",
    "WorkerContext",
    "WorkerGroup",
    "WorkerReference",
    "WorkerSpec",
    "items_of_first",
    "on_shards",
    "on_workers",
]

_P = ParamSpec("_P")
_Ts = TypeVarTuple("_Ts")
_R = TypeVar("_R")
_W = TypeVar("_W")
_Made = TypeVar("_Made", covariant=True)


@frozen(kw_only=True)
class WorkerContext:
    """Place of a worker: its rank, device and rendezvous."""

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
    """Whether workers of other roles hold memory on this device too."""


class SupportsShutdown(Protocol):
    """An object that can be shut down."""

    def shutdown(self) -> None:
        """Release everything."""
        ...


class Worker(SupportsShutdown, Protocol):
    """What a launcher itself calls on a worker; callers of its group call the worker's other methods."""

    def setup(self, config: Any, context: WorkerContext) -> None:
        """Prepare the worker for its first call, with the `config` of its `WorkerSpec`."""
        ...


@runtime_checkable
class WorkerReference(Protocol[_Made]):
    """A worker's class by reference, as in a `ComponentRef`: it is loaded in the worker's process."""

    def load(self) -> Callable[[], _Made]:
        """Return the class."""
        ...


@frozen(kw_only=True)
class WorkerSpec:
    """A group of equal workers to start."""

    role: str
    factory: WorkerReference[Worker] | Callable[[], Worker]
    """`ComponentRef` of the class that every worker creates without arguments and then calls `setup` on."""
    config: object
    """First argument of `setup`."""
    num_workers: int = 1
    devices_per_worker: int = 1
    block: int = 1
    """Number of consecutive workers that must share a machine, because tensor-parallel peers talk in every layer. A
    launcher for one machine may ignore it; one for several refuses a block that no machine has room for."""
    own_process: bool = False
    """Whether even a lone worker must run outside the driver's process. A launcher that always starts processes may
    ignore it."""
    replica: int = 0
    """Index of this group among `num_replicas` equal groups of the role, such as engines that serve side by side and
    fail independently. It takes the devices after those of the replicas before it."""
    num_replicas: int = 1
    env: Mapping[str, str] = field(factory=dict)
    seed: int = 0
    run_dir: str | None = None
    timeout_s: float = 600.0
    start_timeout_s: float | None = None
    """Seconds that `setup` may take, if that is more than the launcher's own deadline for a start."""
    shares_device: bool = False
    """Value of `WorkerContext.shares_device`."""
    manifest: Sequence[Mapping[str, Any]] = ()
    """Rows (`nemo_rl_core.registry.manifest`) of the installed plugins that every worker must have too.

    A launcher that starts processes has each of them compare the rows first, before it imports anything heavy
    (`node_differences`), and passes all answers to `check_nodes`, which raises if they differ."""

    @property
    def label(self) -> str:
        """Name of this group in messages and logs: the role, with the replica's number if there are several."""
        return self.role if self.num_replicas == 1 else f"{self.role}-{self.replica}"


@runtime_checkable
class WorkerGroup(Protocol):
    """Running workers of one role, ranks 0 to size - 1."""

    size: int

    @property
    def local(self) -> Any | None:
        """The worker object if it lives in this process, so that tensors can be shared; None otherwise."""
        ...

    def call(self, method: str, /, *args: object, timeout_s: float | None = None, **kwargs: object) -> list[Any]:
        """Call `method` on every worker with the same arguments; return the results in rank order.

        Raises:
            DeadlineExceeded: Some ranks did not answer in time; the message names them.
            WorkerDied: A worker died; the message has its rank, exit status and the end of its standard error.
            Exception: A worker raised it; the message names the rank.
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
            One result for each shard, from the lowest rank that has it. The other ranks of the shard send no result;
            the call only waits for them.

        Raises:
            ValueError: The number of shards does not match the axes, or the axes do not fit the group.
            Exception: As for `call`; also if a rank raises whose result is not used.
        """
        ...

    def iterate(self, method: str, /, *args: object, timeout_s: float | None = None) -> Any:
        """Call a generator method on every worker; yield the items of rank 0, one at a time."""
        ...

    def check_alive(self) -> None:
        """Raise if a worker died while nobody called it.

        It returns at once, even while another thread calls the workers; that call then reports the death itself. The
        core calls it every few seconds, so it may report a death with some delay. A busy worker is alive.

        Raises:
            WorkerDied: As for `call`; the group has then been shut down.
        """
        ...

    def shutdown(self) -> None:
        """Call `shutdown` on the workers and end their processes; may be called twice."""
        ...


@runtime_checkable
class Launcher(Protocol):
    """Starts worker groups. A component of group `nemo_rl.launchers`, created with its options.

    Attributes:
        config_class: attrs class of `cluster.options` for this launcher.
        in_process: False if no worker ever lives in the driver's process (`WorkerGroup.local` is None). Optional:
            without it, a lone worker lives there unless its spec sets `own_process`.
    """

    config_class: ClassVar[type]

    def setup(self, cluster: ClusterConfig) -> None:
        """Connect to the machines, or detect what this one has.

        Raises:
            ResourceError: The machines lack resources that `cluster` asks for.
        """
        ...

    def launch(self, spec: WorkerSpec) -> WorkerGroup:
        """Start the workers of `spec` and run `setup` on each; returns when all are ready.

        Several threads may call it at once, also during the run, when an engine that died is restarted.
        """
        ...

    def shutdown(self) -> None:
        """End every group that is still running."""
        ...


def on_workers(
    group: WorkerGroup, method: Callable[Concatenate[_W, _P], _R], *, timeout_s: float | None = None
) -> Callable[_P, list[_R]]:
    """Return `group.call` for one method of its workers, with the types of that method.

    `on_workers(group, TrainingBackend.load_checkpoint)(path)` calls `load_checkpoint` on every worker, and returns the
    results in rank order.
    """

    def call(*args: _P.args, **kwargs: _P.kwargs) -> list[_R]:
        return group.call(method.__name__, *args, timeout_s=timeout_s, **kwargs)

    return call


def on_shards(
    group: WorkerGroup,
    method: Callable[[_W, Unpack[_Ts]], _R],
    *,
    axes: Mapping[str, int],
    over: str | Sequence[str] = "dp",
    timeout_s: float | None = None,
) -> Callable[[Sequence[tuple[*_Ts]]], list[_R]]:
    """Return `group.call_sharded` for one method of its workers, with the types of that method."""

    def call(shards: Sequence[tuple[*_Ts]]) -> list[_R]:
        return group.call_sharded(method.__name__, shards, axes=axes, over=over, timeout_s=timeout_s)

    return call


def items_of_first(
    group: WorkerGroup, method: Callable[[_W, Unpack[_Ts]], Iterator[_R]], *, timeout_s: float | None = None
) -> Callable[[Unpack[_Ts]], Generator[_R, None, None]]:
    """Return `group.iterate` for one generator method of its workers, with the types of that method."""

    def iterate(*args: *_Ts) -> Generator[_R, None, None]:
        items: Generator[_R, None, None] = group.iterate(method.__name__, *args, timeout_s=timeout_s)
        return items

    return iterate
