"""Placement and start of a run's engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from nemo_rl_core.errors import ConfigError, NemoRLError
from nemo_rl_core.infra.engines.host import EngineHost, HostConfig
from nemo_rl_core.infra.engines.workers import EngineWorkers
from nemo_rl_core.protocols.generation_backend import GenerationBackend
from nemo_rl_core.protocols.launcher import Launcher, WorkerGroup, WorkerSpec
from nemo_rl_core.protocols.weight_sync import WeightSync
from nemo_rl_core.registry import ComponentRef, get_registry
from nemo_rl_core.schema import ComponentChoice

if TYPE_CHECKING:
    from nemo_rl_core.schema import GenerationConfig, RunConfig
    from nemo_rl_core.training.model.policy import Policy

__all__ = [
    "EnginePlacement",
    "choose_weight_sync",
    "engine_placement",
    "may_share",
    "start_engine",
    "takes_updates_in_flight",
]

_ROLE = "generation"
_SYNCS = "weight_syncs"
_REPORT_S = 60.0


@frozen(kw_only=True)
class EnginePlacement:
    """Where the engines of a run live."""

    num_workers: int
    """Engine processes; 0 is one engine in the driver's process."""
    devices_per_worker: int
    why: str
    """The settings that decided it, for messages."""

    @property
    def in_driver(self) -> bool:
        """Whether the engine lives in the driver's process."""
        return self.num_workers == 0


def engine_placement(
    config: RunConfig, engine_class: type[GenerationBackend], launcher: Launcher | type[Launcher]
) -> EnginePlacement:
    """Where the engines of a run live, from `generation.num_workers`, `cluster` and the launcher.

    Raises:
        ConfigError: `cluster.roles.generation` has no room for an engine.
    """
    cluster, asked = config.cluster, config.generation.num_workers
    counted = getattr(engine_class, "devices_per_worker", None)
    devices = 1 if counted is None else int(counted(config.generation))
    if asked is not None:
        return EnginePlacement(num_workers=asked, devices_per_worker=devices, why=f"generation.num_workers is {asked}")
    share = None if cluster.colocated else cluster.roles.get(_ROLE)
    if share is not None:
        if share < devices:
            raise ConfigError(
                f"cluster.roles.generation is {share}, but one engine of {engine_class.__name__} takes {devices} "
                "devices. Give the role more devices, or make the engine smaller (generation.options)."
            )
        return EnginePlacement(
            num_workers=share // devices,
            devices_per_worker=devices,
            why=f"cluster.colocated is false and cluster.roles.generation is {share}",
        )
    if not getattr(launcher, "in_process", True):
        return EnginePlacement(
            num_workers=1,
            devices_per_worker=devices,
            why=f"the launcher {config.cluster.launcher!r} starts every worker in a process of its own",
        )
    return EnginePlacement(num_workers=0, devices_per_worker=devices, why="generation.num_workers is not set")


def choose_weight_sync(config: RunConfig, placement: EnginePlacement) -> ComponentChoice:
    """The weight sync that is configured, or the default of where the engines live.

    Raises:
        ConfigError: It does not reach the engines; names those that do.
        PluginConflict: None is chosen, none is declared as the default, and several reach the engines.
    """
    needed = "driver" if placement.in_driver else "workers"
    choice, registry = config.weight_sync, get_registry()
    if choice.name is None:
        together = config.cluster.colocated and config.cluster.num_nodes == 1
        cases = ("colocated", needed) if together else (needed,)
        choice = ComponentChoice(name="in_process" if placement.in_driver else registry.default(_SYNCS, *cases))
    if choice.name is not None:
        sync_class = registry.resolve(_SYNCS, choice.name, plugins=config.plugins).load()
        if needed in _placements(sync_class):
            return choice
    fitting = _fitting(needed, config.plugins)
    where = "in the driver's process" if placement.in_driver else "in processes of their own"
    back = (
        "" if placement.in_driver else " Or leave generation.num_workers and cluster.roles out: one engine in-process."
    )
    fix = f"Set weight_sync to one of: {', '.join(fitting)}." if fitting else "Install a package that provides one."
    raise ConfigError(
        f"weight_sync: {choice.name} does not reach the engines, which live {where} ({placement.why}). {fix}{back}"
    )


def _placements(sync_class: type[WeightSync]) -> frozenset[str]:
    return frozenset(getattr(sync_class, "placements", {"driver"}))


def _fitting(needed: str, plugins: Mapping[str, str]) -> list[str]:
    """Names of the installed weight syncs that reach such an engine."""
    registry, found = get_registry(), []
    for name in registry.names(_SYNCS):
        try:
            component = registry.resolve(_SYNCS, name, plugins=plugins).load()
        except NemoRLError:  # a broken one is no advice
            continue
        if needed in _placements(component):
            found.append(name)
    return sorted(found)


def _start_timeout_s(engine_class: type[GenerationBackend], config: GenerationConfig) -> float | None:
    """The engine's own deadline, and the time to report that it has passed."""
    asked = getattr(engine_class, "start_timeout_s", None)
    return None if asked is None else float(asked(config)) + _REPORT_S


def start_engine(
    launcher: Launcher,
    engine: ComponentRef,
    *,
    config: GenerationConfig,
    placement: EnginePlacement,
    seed: int,
    run_dir: str,
    manifest: Sequence[Mapping[str, Any]],
    shares_device: bool = False,
) -> GenerationBackend:
    """The engine itself, or what stands for the engines in other processes.

    Args:
        launcher: Starts it.
        engine: The generation backend.
        config: Of the engine.
        placement: Where it lives.
        seed: Of the run.
        run_dir: Of the run.
        manifest: Plugins that the engine's process must have too.
        shares_device: Whether a trainer holds memory on the engine's devices.

    Raises:
        ConfigError: The launcher put a worker that may live in this process into another.
    """
    spec = WorkerSpec(
        role=_ROLE,
        factory=engine,
        config=config,
        devices_per_worker=placement.devices_per_worker,
        seed=seed,
        run_dir=run_dir,
        manifest=manifest,
        shares_device=shares_device,
        start_timeout_s=_start_timeout_s(engine.load(), config),
    )
    if placement.in_driver:
        group = launcher.launch(spec)
        if group.local is None:
            group.shutdown()
            raise ConfigError(
                f"{type(launcher).__name__} put the generation backend into another process, though it does not say "
                "`in_process = False`. Set generation.num_workers: 1, and tell the launcher's author."
            )
        local: GenerationBackend = group.local
        return local
    hosted = evolve(
        spec,
        factory=EngineHost,
        config=HostConfig(engine=engine, generation=config),
        own_process=True,
        num_replicas=placement.num_workers,
    )

    def launch(index: int) -> WorkerGroup:
        return launcher.launch(evolve(hosted, replica=index))

    return EngineWorkers.start(
        launch,
        num_workers=placement.num_workers,
        role=_ROLE,
        seed=seed,
        timeout_s=config.call_timeout_s,
        heartbeat_timeout_s=config.heartbeat_timeout_s,
        max_restarts=config.max_restarts,
    )


def may_share(config: RunConfig, policy: Policy, engine: type[GenerationBackend]) -> bool:
    """Whether the engine may sample from the trainer's own tensors."""
    backend = policy.group.local
    return (
        backend is not None
        and config.rollouts.staleness == 0
        and config.generation.precision in (None, config.policy.precision)
        and "share_weights" in backend.capabilities
        and "share_weights" in engine.capabilities
    )


def takes_updates_in_flight(config: RunConfig, engine: type[GenerationBackend]) -> bool:
    """Whether new weights are loaded under the requests in flight: as configured, or if the engine can.

    Raises:
        ConfigError: It is configured, and the engine cannot.
    """
    can = "in_flight_updates" in engine.capabilities
    if config.rollouts.weight_updates == "in_flight" and not can:
        raise ConfigError(
            f"rollouts.weight_updates is in_flight, but the generation backend {engine.__name__} cannot take new "
            "weights while it samples (it lacks the capability 'in_flight_updates'). Set it to between, or choose "
            "another backend."
        )
    return can and config.rollouts.weight_updates != "between"
