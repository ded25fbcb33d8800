"""The parts of a run."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, TypedDict, Unpack

from attrs import define, evolve, field

from nemo_rl_core.data.module import DataModule
from nemo_rl_core.machine.clock import Clock, SystemClock
from nemo_rl_core.protocols.algorithm import Algorithm
from nemo_rl_core.protocols.generation_backend import GenerationBackend, SamplingParams
from nemo_rl_core.protocols.weight_sync import WeightSync
from nemo_rl_core.registry import ComponentRef
from nemo_rl_core.rollouts.engine import EnvironmentFactory
from nemo_rl_core.rollouts.recorded import RecordedRollouts
from nemo_rl_core.rollouts.runner import RolloutRunner
from nemo_rl_core.schema import RunConfig
from nemo_rl_core.training.model.device_turns import DeviceTurns
from nemo_rl_core.training.model.policy import InitialModel, Policy

if TYPE_CHECKING:
    from nemo_rl_core.models.tokenizer import Tokenizer
    from nemo_rl_core.protocols.reward import Reward

__all__ = ["RunInputs", "RunParts", "SamplingChanges", "sampling_params"]

SHUTDOWN_TIMEOUT_S = 10.0


@define(kw_only=True)
class RunInputs:
    """Python objects given to `fit` beside the configuration."""

    train_rows: object = None
    validation_rows: object = None
    reward: Reward | None = None
    environment: EnvironmentFactory | type | None = None
    recorded: RecordedRollouts | None = None
    """Rollouts to train on: then no generation backend and no environment is built, and no data is read."""


@define(kw_only=True)
class RunParts:
    """The objects of one run. Of an evaluation, only those that sample: there is no model and no algorithm."""

    config: RunConfig
    tokenizer: Tokenizer
    data: DataModule
    _algorithm: Algorithm | None = None
    models: dict[str, Policy | InitialModel] = field(factory=dict)
    """The policy, and the algorithm's other models, by role: each a `Policy`, or the `InitialModel` of one."""
    generation: GenerationBackend | None = None
    weight_sync: WeightSync | None = None
    runner: RolloutRunner | None = None
    share_weights: bool = False
    in_flight_updates: bool = True
    """Whether new weights are loaded while the engine samples."""
    turns: DeviceTurns = field(factory=DeviceTurns)
    """Whether the models and the engine leave the devices that they share to each other in turn."""
    clock: Clock = field(factory=SystemClock)
    recorded: RecordedRollouts | None = None
    components: list[ComponentRef] = field(factory=list)
    _stack: ExitStack = field(factory=ExitStack, repr=False)

    @property
    def algorithm(self) -> Algorithm:
        """What the run trains with; an evaluation has none."""
        assert self._algorithm is not None, "an evaluation has no algorithm"
        return self._algorithm

    @algorithm.setter
    def algorithm(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm

    @property
    def policy(self) -> Policy:
        """The model that is sampled from; an evaluation has none."""
        policy = self.models["policy"]
        assert not isinstance(policy, InitialModel)
        return policy

    @property
    def trained(self) -> dict[str, Policy]:
        """The models that take optimizer steps, which a checkpoint holds."""
        roles = {} if self._algorithm is None else self._algorithm.models
        return {
            name: model
            for name, model in self.models.items()
            if not isinstance(model, InitialModel) and (name not in roles or roles[name].trained)
        }

    def check_alive(self) -> None:
        """Notice a worker of a model that has died while it had nothing to do.

        Raises:
            WorkerDied: Names it.
        """
        for model in self.models.values():
            if isinstance(model, Policy):  # the others are a policy's too
                model.check_alive()

    def close(self) -> None:
        """Stop threads and processes, newest first; may be called twice."""
        self._stack.close()


class SamplingChanges(TypedDict, total=False):
    """How one kind of sampling, such as validation, differs from that of the run."""

    temperature: float
    max_new_tokens: int


def sampling_params(config: RunConfig, **changes: Unpack[SamplingChanges]) -> SamplingParams:
    """Return how the run samples, as `generation` of its configuration says, with some changes."""
    generation = config.generation
    params = SamplingParams(
        max_new_tokens=generation.max_new_tokens or config.policy.max_sequence_length,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        stop=generation.stop,
        stop_token_ids=generation.stop_token_ids,
    )
    return evolve(params, **changes)
