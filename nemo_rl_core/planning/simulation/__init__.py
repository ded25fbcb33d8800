"""Deterministic simulation of a run: the real loop, buffer and rollout engine on a virtual clock.

Engines, trainer, weight updates and environments are simulated, with latencies and faults that follow from a seed.
"""

from nemo_rl_core.planning.simulation.clock import SimulatedKill, VirtualClock, VirtualLoop
from nemo_rl_core.planning.simulation.run import SimulatedRun, SimulationResult, simulate
from nemo_rl_core.planning.simulation.spec import EngineSpec, Faults, ResponseLengths, SimulatedCluster
from nemo_rl_core.testing.schedules import ScheduleReport, draw_cluster, run_schedule

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
