"""Contract of an algorithm: its config, the models it needs, its data transform and its loss.

Nothing of set-up, logging, checkpoints, validation or distribution: those exist once, in the run loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from attrs import frozen

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.loss import Loss

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_rl_core.models.numerics.over_vocabulary import OutputLayer
    from nemo_rl_core.models.tokenizer import Tokenizer
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_core.records.kept import Kept
    from nemo_rl_core.records.rollout import RolloutGroup
    from nemo_rl_core.schema import PolicyConfig

__all__ = ["Algorithm", "AlgorithmContext", "BaseAlgorithm", "Model", "ModelRole", "Update", "feed_of"]


@frozen(kw_only=True)
class AlgorithmContext:
    """What the run loop lends to an algorithm."""

    tokenizer: Tokenizer
    resolve: Any
    """`resolve(kind, choice) -> object`: build the component that a `ComponentChoice` names."""
    max_sequence_length: int


@frozen(kw_only=True)
class ModelRole:
    """A model beside the policy, run by the same training backends."""

    config: PolicyConfig
    """Its model, backend and budget; a `model_name` of None is the policy's."""
    capabilities: frozenset[str] = frozenset()
    """What the algorithm asks of its training backend beside the usual, see `TrainingBackend.capabilities`."""
    trained: bool = False
    """It takes optimizer steps (a critic) and stands in the checkpoints; else it is frozen and has no optimizer."""


@frozen
class Update:
    """One optimizer step of one model."""

    indices: Sequence[int]
    """Sequences of the batch to train on."""
    loss: Loss
    model: str = "policy"
    """Name in `Algorithm.models`, or "policy"."""


class Model(Protocol):
    """A running model as an algorithm sees it: the policy, or one of its `models`.

    Nothing here carries a gradient.
    """

    def logprobs(self, batch: BatchedDataDict) -> Tensor:
        """[N] float32 logprobs of the batch's tokens at the sampling temperature; 0 outside `loss_mask`."""
        ...

    def values(self, batch: BatchedDataDict) -> Tensor:
        """[N] float32 output of a scalar head at each token: what the critic or reward model says after it."""
        ...

    def top_logprobs(self, batch: BatchedDataDict, k: int) -> tuple[Tensor, Tensor]:
        """[N, k] token ids and float32 logprobs of the k likeliest tokens in place of each token."""
        ...

    def hidden_states(self, batch: BatchedDataDict) -> Tensor:
        """[N, E] what the output layer makes each token's distribution of; 0 outside `loss_mask`."""
        ...

    def output_layer(self) -> OutputLayer:
        """The output layer, at the sampling temperature, on the CPU."""
        ...

    def keep(self, value: Any) -> Kept:
        """Give the workers of this model a large value once; a loss for it may hold what is returned."""
        ...


@runtime_checkable
class Algorithm(Protocol):
    """A training method. A component of group `nemo_rl.algorithms`: `AlgorithmClass(config, context)`.

    What an algorithm keeps from step to step (a moving baseline, a coefficient under control) it gives and takes
    by two further methods, `state_dict() -> Any` and `load_state_dict(state)`; the run loop saves it with each
    checkpoint, so that a resumed run equals an uninterrupted one. One fed with rollouts that does not learn from their
    rewards says so by `learns_from_rewards = False`, and equal rewards are then no alarm. One that may be trained on
    rollouts of older weights, because it corrects their importance or needs no correction, says so by
    `takes_stale_rollouts = True` (an attribute or a property); the core refuses `rollouts.staleness` above 0 otherwise.

    One that may train on either, as its settings say, has a configuration with the attribute or property `feed`, which
    then stands for the class's (see `feed_of`). One fed with rollouts that takes the rows themselves in some steps
    says which by `samples(step) -> bool`, step being the number of steps done; it may depend on nothing else but the
    configuration, so that a resumed run draws the same. `build_batch` then gets rows, and nothing is sampled.

    Attributes:
        config_class: Root configuration class (a `RunConfig`) that `algorithm: <name>` picks.
        feed: "rollouts": each step consumes groups sampled by the policy; "examples": rows of a dataset.
        loss: The objective of the policy.
    """

    config_class: ClassVar[type]
    feed: ClassVar[Literal["rollouts", "examples"]]
    loss: Loss

    @property
    def models(self) -> Mapping[str, ModelRole]:
        """Models needed beside the policy, by role ("reference", "critic", "teacher", ...)."""
        ...

    @property
    def required_fields(self) -> frozenset[str]:
        """Fields that `fill_batch` adds by a forward pass.

        Of "logprobs" (the policy before this step's update) and "ref_logprobs" (the role "reference").
        """
        ...

    def keep_group(self, group: RolloutGroup) -> bool:
        """Whether a group may be trained on; the loop samples others in place of those refused."""
        ...

    def build_batch(self, items: Sequence[Any]) -> BatchedDataDict:
        """Turn rollout groups (feed "rollouts") or rows (feed "examples") into one global batch.

        At least `input_ids`, `loss_mask`; for rollouts also `rollout_logprobs, rewards, group_ids`.
        """
        ...

    def fill_batch(self, batch: BatchedDataDict, models: Mapping[str, Model]) -> None:
        """Add what only a forward pass can tell, in place.

        Args:
            batch: From `build_batch`.
            models: "policy", and those of `models`.
        """
        ...

    def finish_batch(self, batch: BatchedDataDict) -> Mapping[str, float]:
        """Add what follows from the fields (advantages), in place; return metrics of the batch."""
        ...

    def minibatches(self, batch: BatchedDataDict) -> Sequence[Sequence[int]]:
        """Sequence indices of each optimizer step of this batch, in order; one step by default."""
        ...

    def updates(self, batch: BatchedDataDict) -> Sequence[Update]:
        """Every optimizer step of this batch, of whichever model, in order; by default `minibatches` of the policy."""
        ...


def feed_of(algorithm: Any, config: Any) -> Literal["rollouts", "examples"]:
    """What a run with this configuration is fed with.

    Args:
        algorithm: The class.
        config: Of its `config_class`.
    """
    feed: Literal["rollouts", "examples"] = getattr(config, "feed", None) or algorithm.feed
    return feed


class BaseAlgorithm:
    """Defaults for an algorithm without other models or filters."""

    config_class: ClassVar[type]
    feed: ClassVar[Literal["rollouts", "examples"]] = "rollouts"
    loss: Loss

    def __init__(self, config: Any, context: AlgorithmContext) -> None:
        self.config = config
        self.context = context

    @property
    def models(self) -> Mapping[str, ModelRole]:
        """None beside the policy."""
        return {}

    @property
    def required_fields(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def keep_group(self, group: RolloutGroup) -> bool:
        """Keep every group."""
        return True

    def fill_batch(self, batch: BatchedDataDict, models: Mapping[str, Model]) -> None:
        """Add `required_fields`.

        Raises:
            ConfigError: "ref_logprobs" is required and there is no role "reference".
        """
        required = self.required_fields
        if "logprobs" in required:
            batch.set_tokens("logprobs", models["policy"].logprobs(batch))
        if "ref_logprobs" in required:
            if "reference" not in models:
                raise ConfigError(f"{type(self).__name__} requires ref_logprobs, but its models have no reference.")
            batch.set_tokens("ref_logprobs", models["reference"].logprobs(batch))

    def finish_batch(self, batch: BatchedDataDict) -> Mapping[str, float]:
        """Nothing to add."""
        return {}

    def minibatches(self, batch: BatchedDataDict) -> Sequence[Sequence[int]]:
        """The whole batch in one optimizer step."""
        return [range(len(batch))]

    def updates(self, batch: BatchedDataDict) -> Sequence[Update]:
        """The policy on each minibatch."""
        return [Update(indices, self.loss) for indices in self.minibatches(batch)]
