"""Deterministic simulation of a run: the real loop, buffer and rollout engine on a virtual clock.

Engines, trainer, weight updates and environments are simulated, with latencies and faults that follow from a seed.
"""

from nemo_rl_core.testing.simulation.clock import SimulatedKill, VirtualClock, VirtualLoop
from nemo_rl_core.testing.simulation.run import SimulatedRun, SimulationResult, simulate
from nemo_rl_core.testing.simulation.schedules import ScheduleReport, draw_cluster, run_schedule
from nemo_rl_core.testing.simulation.spec import EngineSpec, Faults, ResponseLengths, SimulatedCluster

__all__ = [
    "EngineSpec",
    "Faults",
    "ResponseLengths",
    "ScheduleReport",
    "SimulatedCluster",
    "SimulatedKill",
    "SimulatedRun",
    "SimulationResult",
    "VirtualClock",
    "VirtualLoop",
    "draw_cluster",
    "run_schedule",
    "simulate",
]
