"""Contract of an algorithm: its config, the models it needs, its data transform and its loss.

An algorithm does no set-up, logging, checkpointing, validation or distribution: the run loop does, for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, overload, runtime_checkable

from attrs import frozen

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.loss import Loss

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_rl_core.models.numerics.over_vocabulary import OutputLayer
    from nemo_rl_core.models.tokenizer import Tokenizer
    from nemo_rl_core.protocols.advantage import AdvantageEstimator
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_core.records.rollout import RolloutGroup
    from nemo_rl_core.records.shared_value import Movable, SharedValue
    from nemo_rl_core.schema import ComponentChoice, PolicyConfig

__all__ = [
    "Algorithm",
    "AlgorithmContext",
    "BaseAlgorithm",
    "BuildsComponents",
    "ChoosesFeed",
    "KeepsState",
    "Model",
    "ModelRole",
    "Update",
    "feed_of",
]


class BuildsComponents(Protocol):
    """Build the component of a kind that a choice of the configuration names, with the options of the choice."""

    @overload
    def __call__(self, kind: Literal["losses"], choice: ComponentChoice, /) -> Loss: ...
    @overload
    def __call__(self, kind: Literal["advantages"], choice: ComponentChoice, /) -> AdvantageEstimator: ...
    @overload
    def __call__(self, kind: str, choice: ComponentChoice, /) -> Any: ...


@frozen(kw_only=True)
class AlgorithmContext:
    """Tools that the run loop gives to an algorithm."""

    tokenizer: Tokenizer
    resolve: BuildsComponents
    """`resolve(kind, choice)` builds the component that a `ComponentChoice` names."""
    max_sequence_length: int


@frozen(kw_only=True)
class ModelRole:
    """A model that the algorithm needs in addition to the policy; the same training backends run it."""

    config: PolicyConfig
    """Model, backend and token budget; a `model_name` of None means the policy's."""
    capabilities: frozenset[str] = frozenset()
    """Capabilities that its training backend must have, see `TrainingBackend.capabilities`."""
    trained: bool = False
    """True: it takes optimizer steps, as a critic does, and checkpoints include it. False: it is frozen and has no
    optimizer."""


@frozen
class Update:
    """One optimizer step of one model."""

    indices: Sequence[int]
    """Indices of the sequences to train on."""
    loss: Loss
    model: str = "policy"
    """Name in `Algorithm.models`, or "policy"."""


class Model(Protocol):
    """A running model as an algorithm sees it: the policy, or one of `Algorithm.models`.

    No result carries a gradient.
    """

    def logprobs(self, batch: BatchedDataDict) -> Tensor:
        """[N] float32 logprobs of the batch's tokens at the sampling temperature; 0 outside `loss_mask`."""
        ...

    def values(self, batch: BatchedDataDict) -> Tensor:
        """[N] float32 output of a scalar head at each token: a critic's value or a reward model's score after it."""
        ...

    def top_logprobs(self, batch: BatchedDataDict, k: int) -> tuple[Tensor, Tensor]:
        """[N, k] token ids and [N, k] float32 logprobs of the k likeliest tokens at each position."""
        ...

    def hidden_states(self, batch: BatchedDataDict) -> Tensor:
        """[N, E] inputs of the output layer that predict each token; 0 outside `loss_mask`."""
        ...

    def output_layer(self) -> OutputLayer:
        """Return the output layer, at the sampling temperature, on the CPU."""
        ...

    def keep(self, value: Movable) -> SharedValue:
        """Send a large value to the workers of this model once; a loss may hold the handle that is returned."""
        ...


@runtime_checkable
class Algorithm(Protocol):
    """A training method. A component of group `nemo_rl.algorithms`: `AlgorithmClass(config, context)`.

    Optional members:

    - `state_dict() -> Any` and `load_state_dict(state)`: state that lasts from step to step, such as a moving baseline.
      The run loop saves it with each checkpoint, so that a resumed run equals an uninterrupted one.
    - `learns_from_rewards = False`: the algorithm uses rollouts but not their rewards. Equal rewards then raise no
      alarm.
    - `takes_stale_rollouts = True` (attribute or property): the algorithm may be trained on rollouts of older weights,
      because it corrects their importance or needs no correction. Without it the core refuses `rollouts.staleness`
      above 0.
    - `samples(step) -> bool`, for feed "rollouts": False for a step that trains on rows instead. `build_batch` then
      gets rows, and nothing is sampled. `step` counts the steps done. The answer may depend on the step and the
      configuration only, so that a resumed run decides alike.
    - `feed` of the configuration (attribute or property): overrides the class's `feed` if the settings decide, see
      `feed_of`.

    Attributes:
        config_class: Root configuration class (a `RunConfig`) that `algorithm: <name>` selects.
        feed: "rollouts" if each step takes groups sampled by the policy, "examples" if it takes rows of a dataset.
        loss: The objective of the policy.
    """

    config_class: ClassVar[type]
    feed: ClassVar[Literal["rollouts", "examples"]]
    loss: Loss

    if TYPE_CHECKING:

        def __init__(self, config: Any, context: AlgorithmContext) -> None: ...

    @property
    def models(self) -> Mapping[str, ModelRole]:
        """Models needed in addition to the policy, by role ("reference", "critic", "teacher", ...)."""
        ...

    @property
    def required_fields(self) -> frozenset[str]:
        """Fields that `fill_batch` adds by a forward pass.

        Either or both of "logprobs" (the policy before this step's update) and "ref_logprobs" (the role "reference").
        """
        ...

    def keep_group(self, group: RolloutGroup) -> bool:
        """Return whether a group may be trained on; the loop samples others in place of refused ones."""
        ...

    def build_batch(self, items: Sequence[Any]) -> BatchedDataDict:
        """Turn rollout groups (feed "rollouts") or rows (feed "examples") into one global batch.

        The batch has at least `input_ids` and `loss_mask`; for rollouts also `rollout_logprobs`, `rewards` and
        `group_ids`.
        """
        ...

    def fill_batch(self, batch: BatchedDataDict, models: Mapping[str, Model]) -> None:
        """Add the fields that need a forward pass, in place.

        Args:
            batch: The batch that `build_batch` returned.
            models: The policy under "policy", and each of `models` under its role.
        """
        ...

    def finish_batch(self, batch: BatchedDataDict) -> Mapping[str, float]:
        """Add fields that are computed from others, such as advantages, in place; return metrics of the batch."""
        ...

    def minibatches(self, batch: BatchedDataDict) -> Sequence[Sequence[int]]:
        """Return the sequence indices of each optimizer step, in order; one step for the whole batch by default."""
        ...

    def updates(self, batch: BatchedDataDict) -> Sequence[Update]:
        """Return every optimizer step of this batch, of any model, in order; by default the policy on `minibatches`."""
        ...


@runtime_checkable
class KeepsState(Protocol):
    """An algorithm with state that lasts from step to step, see `Algorithm`."""

    def state_dict(self) -> Any:
        """Return the state; it is saved with each checkpoint."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Take the state of a checkpoint."""
        ...


@runtime_checkable
class ChoosesFeed(Protocol):
    """An algorithm that trains on rollouts in some steps and on rows in others, see `Algorithm`."""

    def samples(self, step: int) -> bool:
        """Return whether a step trains on rollouts. `step` counts the steps done."""
        ...


def feed_of(algorithm: Algorithm | type[Algorithm], config: object) -> Literal["rollouts", "examples"]:
    """Return whether a run with this configuration trains on rollouts or on examples.

    Args:
        algorithm: The algorithm class.
        config: An object of its `config_class`.
    """
    feed: Literal["rollouts", "examples"] = getattr(config, "feed", None) or algorithm.feed
    return feed


class BaseAlgorithm:
    """Base class with defaults for an algorithm without other models or filters."""

    config_class: ClassVar[type]
    feed: ClassVar[Literal["rollouts", "examples"]] = "rollouts"
    loss: Loss

    def __init__(self, config: Any, context: AlgorithmContext) -> None:
        self.config = config
        self.context = context

    @property
    def models(self) -> Mapping[str, ModelRole]:
        """No model but the policy."""
        return {}

    @property
    def required_fields(self) -> frozenset[str]:
        """No fields."""
        return frozenset()

    def keep_group(self, group: RolloutGroup) -> bool:
        """Keep every group."""
        return True

    def fill_batch(self, batch: BatchedDataDict, models: Mapping[str, Model]) -> None:
        """Add `required_fields`.

        Raises:
            ConfigError: "ref_logprobs" is required but there is no role "reference".
        """
        required = self.required_fields
        if "logprobs" in required:
            batch.set_tokens("logprobs", models["policy"].logprobs(batch))
        if "ref_logprobs" in required:
            if "reference" not in models:
                raise ConfigError(f"{type(self).__name__} requires ref_logprobs, but its models have no reference.")
            batch.set_tokens("ref_logprobs", models["reference"].logprobs(batch))

    def finish_batch(self, batch: BatchedDataDict) -> Mapping[str, float]:
        """Add nothing and report no metrics."""
        return {}

    def minibatches(self, batch: BatchedDataDict) -> Sequence[Sequence[int]]:
        """Take the whole batch in one optimizer step."""
        return [range(len(batch))]

    def updates(self, batch: BatchedDataDict) -> Sequence[Update]:
        """Train the policy on each minibatch."""
        return [Update(indices, self.loss) for indices in self.minibatches(batch)]
