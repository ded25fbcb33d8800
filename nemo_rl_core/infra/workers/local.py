"""The local launcher: one worker lives in this process, several get one process per device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field, frozen
from attrs.validators import gt

from nemo_rl_core.errors import ResourceError
from nemo_rl_core.infra.workers.axes import dispatch
from nemo_rl_core.infra.workers.making import kind_of, make_worker
from nemo_rl_core.infra.workers.resources import ResourceManager
from nemo_rl_core.protocols.launcher import SupportsShutdown, Worker, WorkerContext, WorkerGroup, WorkerSpec, on_workers
from nemo_rl_core.registry import PluginCall

if TYPE_CHECKING:
    from nemo_rl_core.schema import ClusterConfig

__all__ = ["InProcessGroup", "LocalConfig", "LocalLauncher"]


@frozen(kw_only=True)
class LocalConfig:
    """Options of the local launcher."""

    start_timeout_s: float = field(default=300.0, validator=gt(0))
    """Deadline of starting a group's processes and of their `setup`."""
    call_timeout_s: float = field(default=3600.0, validator=gt(0))
    """Deadline of a call to workers in other processes that sets none itself: no wait is without one."""
    failure_grace_s: float = field(default=10.0, validator=gt(0))
    """When one worker raises, how long the others may take to answer before they are ended as well."""


class InProcessGroup:
    """A group of one worker in this process; its tensors can be shared.

    Calls run in the caller's thread, so nothing can cut them short: `timeout_s` is not enforced.
    """

    size = 1

    def __init__(self, worker: SupportsShutdown, *, kind: str = "training_backends") -> None:
        self._worker: SupportsShutdown | None = worker
        self._kind = kind

    @property
    def local(self) -> Any | None:
        """The worker."""
        return self._worker

    def _alive(self) -> SupportsShutdown:
        if self._worker is None:
            raise RuntimeError("This worker group has been shut down.")
        return self._worker

    def call(self, method: str, /, *args: object, timeout_s: float | None = None, **kwargs: object) -> list[Any]:
        """Return `[worker.method(*args, **kwargs)]`."""
        worker = self._alive()
        with PluginCall(self._kind, worker, method):
            return [getattr(worker, method)(*args, **kwargs)]

    def call_each(
        self, method: str, arguments: Sequence[tuple[Any, ...]], /, *, timeout_s: float | None = None
    ) -> list[Any]:
        """Return `[worker.method(*arguments[0])]`."""
        (only,) = arguments
        worker = self._alive()
        with PluginCall(self._kind, worker, method):
            return [getattr(worker, method)(*only)]

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
        """Return `[worker.method(*shards[0])]`: every axis has size 1."""
        dispatch(axes, over, num_ranks=1, num_shards=len(shards), what=method)
        return self.call_each(method, shards)

    def iterate(self, method: str, /, *args: object, timeout_s: float | None = None) -> Iterator[Any]:
        """Yield the items of the worker's generator."""
        worker = self._alive()
        with PluginCall(self._kind, worker, method):
            yield from getattr(worker, method)(*args)

    def check_alive(self) -> None:
        """Do nothing: the worker lives as long as this process does."""

    def shutdown(self) -> None:
        """Shut the worker down; does nothing the second time."""
        worker, self._worker = self._worker, None
        if worker is not None:
            with PluginCall(self._kind, worker, "shutdown"):
                worker.shutdown()


class LocalLauncher:
    """Starts worker groups on this machine.

    Args:
        config: Options; None takes the defaults.
    """

    config_class: ClassVar[type] = LocalConfig

    def __init__(self, config: LocalConfig | None = None) -> None:
        self.config = config or LocalConfig()
        self.resources: ResourceManager | None = None
        self._groups: list[WorkerGroup] = []

    def setup(self, cluster: ClusterConfig) -> None:
        """Detect the resources of this machine.

        Raises:
            ResourceError: It does not have what `cluster` asks for.
        """
        if cluster.num_nodes > 1:
            raise ResourceError(
                f"The local launcher runs on one machine; cluster.num_nodes is {cluster.num_nodes}. Choose a launcher "
                "for clusters (cluster.launcher), or set cluster.num_nodes: 1."
            )
        self.resources = ResourceManager(cluster)

    def launch(self, spec: WorkerSpec) -> WorkerGroup:
        """Start the workers of `spec` and run their `setup`.

        Raises:
            ResourceError: More devices are asked for than there are.
            WorkerDied: A process ended during its start.
            DeadlineExceeded: A worker was not ready in `start_timeout_s`, the launcher's or that of `spec`.
        """
        if self.resources is None:
            raise RuntimeError("LocalLauncher.setup(cluster) must come before launch().")
        placement = self.resources.place(
            spec.role,
            num_workers=spec.num_workers,
            devices_per_worker=spec.devices_per_worker,
            replica=spec.replica,
            num_replicas=spec.num_replicas,
        )
        contexts = [
            WorkerContext(
                role=spec.role,
                rank=rank,
                world_size=spec.num_workers,
                local_rank=rank,
                device=device,
                seed=spec.seed,
                run_dir=spec.run_dir,
                timeout_s=spec.timeout_s,
                num_threads=placement.num_threads,
                shares_device=spec.shares_device,
            )
            for rank, device in enumerate(placement.devices)
        ]
        alone = spec.num_workers == 1 and not spec.own_process
        group = self._in_process(spec, contexts[0]) if alone else self._processes(spec, contexts)
        self._groups.append(group)
        return group

    def _in_process(self, spec: WorkerSpec, context: WorkerContext) -> WorkerGroup:
        os.environ.update(spec.env)
        worker = make_worker(spec.factory)
        group = InProcessGroup(worker, kind=kind_of(spec.factory))
        on_workers(group, Worker.setup)(spec.config, context)
        return group

    def _processes(self, spec: WorkerSpec, contexts: Sequence[WorkerContext]) -> WorkerGroup:
        from nemo_rl_core.infra.workers.processes import ProcessGroup

        return ProcessGroup.start(
            spec,
            contexts,
            start_timeout_s=max(self.config.start_timeout_s, spec.start_timeout_s or 0.0),
            call_timeout_s=self.config.call_timeout_s,
            failure_grace_s=self.config.failure_grace_s,
        )

    def shutdown(self) -> None:
        """End every group; does nothing the second time."""
        groups, self._groups = self._groups, []
        for group in reversed(groups):
            group.shutdown()
