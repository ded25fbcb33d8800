"""Specification of a simulation: a cluster, its speeds and its faults."""

from __future__ import annotations

import math
import random

from attrs import Factory, field, frozen

from nemo_rl_core.schema import RolloutConfig

__all__ = ["EngineSpec", "Faults", "ResponseLengths", "SimulatedCluster"]


@frozen(kw_only=True)
class EngineSpec:
    """The generation engines, all alike."""

    num_engines: int = 1
    max_batch: int = 64
    """Sequences that one engine decodes together; more wait."""
    tokens_per_s: float = 1000.0
    """New tokens of one engine at a full batch."""
    sequence_tokens_per_s: float = math.inf
    """New tokens of one sequence at most, however few there are beside it."""
    request_s: float = 0.0
    """Seconds before the first token of a request: network, queueing, prefill."""
    in_flight_updates: bool = True
    """Takes new weights while it samples."""


@frozen(kw_only=True)
class ResponseLengths:
    """New tokens of one turn: log-normal, cut at `longest`."""

    mean: float = 512.0
    spread: float = 0.0
    """Standard deviation over mean; 0 makes all alike, 1 a long tail."""
    longest: int = 1 << 20

    def draw(self, rng: random.Random) -> int:
        """One length, at least 1."""
        if self.spread == 0:
            return max(1, min(round(self.mean), self.longest))
        sigma = math.sqrt(math.log1p(self.spread**2))
        return max(1, min(round(rng.lognormvariate(math.log(self.mean) - sigma**2 / 2, sigma)), self.longest))


@frozen(kw_only=True)
class Faults:
    """Probabilities of what goes wrong; drawn from the seed of the simulation."""

    request_error: float = 0.0
    """A request fails."""
    request_stuck: float = 0.0
    """A request is never answered."""
    request_slow: float = 0.0
    """A response is twenty times as long."""
    environment_error: float = 0.0
    """An environment raises."""
    environment_stuck: float = 0.0
    """An environment never answers."""
    engine_crash_every_s: float = math.inf
    """Mean time between crashes of an engine: every request that it has fails."""
    refit_error: float = 0.0
    """A weight update passes its deadline, which ends the run (it is then resumed)."""
    refused: float = 0.0
    """The algorithm refuses a group (dynamic sampling)."""


@frozen(kw_only=True)
class SimulatedCluster:
    """A run and the machines under it. Times in seconds."""

    num_steps: int = 8
    num_prompts: int = 4
    """Groups of one step."""
    group_size: int = 2
    num_turns: int = 1
    """Turns of an episode at most; each ends it with equal probability."""
    mean_turns: float | None = None
    """In place of `num_turns`: each episode has this many, rounded up or down so that it is their mean."""
    rollouts: RolloutConfig = Factory(RolloutConfig)
    """As in the configuration of a run: staleness, order, deadlines, ..."""
    engine: EngineSpec = Factory(EngineSpec)
    lengths: ResponseLengths = Factory(ResponseLengths)
    prompt_tokens: int = 0
    """Trained with each response as context."""
    environment_s: float = 0.0
    """One answer of the environment."""
    step_s: float = 0.0
    """Of a training step, whatever its tokens."""
    train_tokens_per_s: float = math.inf
    """Prompt and response tokens that all trainers together take per second."""
    refit_s: float = 0.0
    """Weights from trainer to engines."""
    shared_devices: bool = False
    """The engines stand still while the trainer computes or refits them."""
    jitter: float = 0.0
    """Times of training, refit and environment vary by this share."""
    checkpoint_every: int = 0
    """Steps between checkpoints."""
    max_rows: int | None = field(default=None)
    """Prompts in the data; None is without end."""
    max_batches: int = 1000
    """Times the prompts of a step that may be sampled for one, where groups are refused."""
    faults: Faults = Factory(Faults)
