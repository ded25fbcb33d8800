"""Deterministic simulation of a run: the real loop, buffer and rollout engine on a virtual clock.

Engines, trainer, weight updates and environments are simulated, with latencies and faults that follow from a seed.
"""

from nemo_rl_core.planning.simulation.clock import SimulatedKill, VirtualClock, VirtualLoop
from nemo_rl_core.planning.simulation.run import SimulatedRun, SimulationResult, simulate
from nemo_rl_core.planning.simulation.spec import EngineSpec, Faults, ResponseLengths, SimulatedCluster

__all__ = [
    "EngineSpec",
    "Faults",
    "ResponseLengths",
    "SimulatedCluster",
    "SimulatedKill",
    "SimulatedRun",
    "SimulationResult",
    "VirtualClock",
    "VirtualLoop",
    "simulate",
]
