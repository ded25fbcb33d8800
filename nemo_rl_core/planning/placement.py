"""Engines that a run would have, by the rules of the run itself."""

from __future__ import annotations

from attrs import frozen

from nemo_rl_core.registry import get_registry
from nemo_rl_core.schema import RunConfig
from nemo_rl_core.training.model.device_turns import share_devices
from nemo_rl_core.training.setup.engine import engine_placement

__all__ = ["PlannedEngines", "planned_engines"]


@frozen(kw_only=True)
class PlannedEngines:
    """The engines of a run."""

    num_engines: int
    devices_per_engine: int
    shares_devices: bool
    """With the trainer: what one side computes, the other cannot."""
    in_flight_updates: bool
    """New weights come while the engines sample."""
    why: str
    """The settings that decided the number."""


def planned_engines(config: RunConfig, num_engines: int | None = None) -> PlannedEngines:
    """The engines of a run, none of which is started.

    Args:
        config: Finalized.
        num_engines: In place of those that the configuration has.

    Raises:
        ConfigError: `cluster.roles.generation` has no room for an engine.
        PluginError: The launcher or the generation backend cannot be loaded.
    """
    registry = get_registry()
    engine_class = registry.resolve("generation_backends", config.generation.backend, plugins=config.plugins).load()
    launcher = registry.resolve("launchers", config.cluster.launcher, plugins=config.plugins).load()
    placement = engine_placement(config, engine_class, launcher)
    can = "in_flight_updates" in engine_class.capabilities
    return PlannedEngines(
        num_engines=num_engines or max(1, placement.num_workers),
        devices_per_engine=placement.devices_per_worker,
        # The cores of a CPU are shared out by the system; processes on an accelerator wait for each other.
        shares_devices=share_devices(config) and config.cluster.device != "cpu",
        in_flight_updates=can and config.rollouts.weight_updates != "between",
        why="--engines" if num_engines else placement.why,
    )
