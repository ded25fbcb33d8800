"""Plan of a run on a cluster that is not here: a simulation of its configuration at given rates."""

from __future__ import annotations

import math

from attrs import evolve, frozen

from nemo_rl_core.errors import ConfigError, EnvironmentFailure
from nemo_rl_core.planning.placement import PlannedEngines, planned_engines
from nemo_rl_core.planning.rates import Rates
from nemo_rl_core.planning.simulation.run import SimulationResult, simulate
from nemo_rl_core.planning.simulation.spec import EngineSpec, Faults, ResponseLengths, SimulatedCluster
from nemo_rl_core.schema import RunConfig

__all__ = ["PlannedRun", "plan_run"]

_NEEDED = {
    "engine_tokens_per_s": "--engine-tokens-per-s",
    "trainer_tokens_per_s": "--trainer-tokens-per-s",
    "response_tokens": "--response-tokens",
}


@frozen(kw_only=True)
class PlannedRun:
    """One configuration, simulated."""

    staleness: int
    engines: PlannedEngines
    num_trainers: int
    generation_s: float
    """Of a step's rollouts, were every engine's batch full all the time."""
    training_s: float
    """Of a step, with the weight update and the overhead where they do not overlap with sampling."""
    result: SimulationResult

    @property
    def bound_s(self) -> float:
        """No step can be shorter: the slower side, or both in turn, with a staleness of 0 or on the same devices."""
        in_turn = self.staleness == 0 or self.engines.shares_devices
        return self.generation_s + self.training_s if in_turn else max(self.generation_s, self.training_s)

    @property
    def efficiency(self) -> float:
        """Bound over predicted step time."""
        return self.bound_s / self.result.step_s


def plan_run(
    config: RunConfig, rates: Rates, *, num_engines: int | None = None, num_steps: int = 12, seed: int = 0
) -> PlannedRun:
    """Simulate a configuration.

    Args:
        config: Finalized; its batch sizes, group size, workers and `rollouts` are taken.
        rates: Speeds of the parts.
        num_engines: Generation engines in place of those of the configuration.
        num_steps: Steps to simulate; the first half is left to warm up.
        seed: Of the response lengths.

    Raises:
        ConfigError: A rate that is needed is not known, or the algorithm samples no rollouts.
    """
    missing = [option for name, option in _NEEDED.items() if getattr(rates, name) is None]
    if missing:
        raise ConfigError(
            f"A plan needs {', '.join(missing)}. Give them, or name a run that measured them: --rates-from RUN_DIR."
        )
    assert rates.engine_tokens_per_s and rates.trainer_tokens_per_s and rates.response_tokens
    workers, engines = config.policy.num_workers, planned_engines(config, num_engines)
    longest = config.generation.max_new_tokens or config.policy.max_sequence_length
    cluster = SimulatedCluster(
        num_steps=max(num_steps, 2 * config.rollouts.staleness + 4),
        num_prompts=config.num_items_per_step,
        group_size=config.group_size,
        mean_turns=rates.turns,
        rollouts=evolve(config.rollouts, max_turns=max(config.rollouts.max_turns, math.ceil(rates.turns))),
        faults=Faults(refused=rates.refused_groups),
        engine=EngineSpec(
            num_engines=engines.num_engines,
            max_batch=rates.engine_batch,
            tokens_per_s=rates.engine_tokens_per_s,
            sequence_tokens_per_s=rates.sequence_tokens_per_s or float("inf"),
            in_flight_updates=engines.in_flight_updates,
        ),
        lengths=ResponseLengths(mean=rates.response_tokens, spread=rates.response_spread, longest=longest),
        prompt_tokens=round(rates.prompt_tokens),
        environment_s=rates.environment_s,
        step_s=rates.overhead_s,
        train_tokens_per_s=rates.trainer_tokens_per_s * workers,
        refit_s=rates.refit_s,
        shared_devices=engines.shares_devices,
    )
    _check_deadlines(config, rates, longest)
    try:
        result = simulate(cluster, seed)
    except EnvironmentFailure as error:
        raise ConfigError(
            f"Most rollouts of the simulation pass a deadline: at these rates a turn takes about "
            f"{_turn_s(cluster):.4g} s where the engines are full, and rollouts.generation_timeout_s is "
            f"{config.rollouts.generation_timeout_s:g}. Give more engines, a lower rollouts.max_in_flight or a longer "
            f"deadline, or look whether the rates are right ({error})."
        ) from error
    sampled = result.tokens_per_s * result.step_s
    return PlannedRun(
        staleness=config.rollouts.staleness,
        engines=engines,
        num_trainers=workers,
        generation_s=sampled / (engines.num_engines * rates.engine_tokens_per_s),
        training_s=result.trained_tokens / cluster.train_tokens_per_s + rates.refit_s + rates.overhead_s,
        result=result,
    )


def _turn_s(cluster: SimulatedCluster) -> float:
    """Seconds of one turn of mean length, its wait for a place included, with as many beside it as there can be."""
    rollouts = cluster.num_prompts * cluster.group_size * (1 + cluster.rollouts.staleness)
    each = -(-min(rollouts, cluster.rollouts.max_in_flight) // cluster.engine.num_engines)
    fastest = cluster.lengths.mean / cluster.engine.sequence_tokens_per_s
    return max(cluster.lengths.mean * each / cluster.engine.tokens_per_s, fastest)


def _check_deadlines(config: RunConfig, rates: Rates, longest: int) -> None:
    """Refuse what no response or answer can keep to.

    Raises:
        ConfigError: Names the rate and the setting.
    """
    assert rates.engine_tokens_per_s and rates.response_tokens
    if rates.response_tokens > longest:
        raise ConfigError(
            f"--response-tokens is {rates.response_tokens:g}, but a turn is cut at generation.max_new_tokens "
            f"{longest}. Raise that, or give the mean of the responses as they are cut."
        )
    limit = config.rollouts.environment_timeout_s
    if rates.environment_s >= limit:
        raise ConfigError(
            f"--environment-s is {rates.environment_s:g}, and rollouts.environment_timeout_s {limit:g} ends every "
            "answer before. Set it higher."
        )
    speed = min(rates.engine_tokens_per_s, rates.sequence_tokens_per_s or math.inf)
    limit = config.rollouts.generation_timeout_s
    if rates.response_tokens / speed >= limit:
        raise ConfigError(
            f"A response of {rates.response_tokens:g} tokens takes {rates.response_tokens / speed:.4g} s even alone at "
            f"{speed:g} tokens/s, and rollouts.generation_timeout_s is {limit:g}. Set it higher, or look whether the "
            "rates are right."
        )
