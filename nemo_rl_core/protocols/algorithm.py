"""Contract of an algorithm: its config, the roles it needs, its data transform and its loss.

Nothing of set-up, logging, checkpoints, validation or distribution: those exist once, in the run loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from attrs import frozen

from nemo_rl_core.protocols.loss import Loss

if TYPE_CHECKING:
    from nemo_rl_core.data.batch import BatchedDataDict
    from nemo_rl_core.data.tokenizer import Tokenizer
    from nemo_rl_core.rollouts.records import RolloutGroup

__all__ = ["Algorithm", "AlgorithmContext", "BaseAlgorithm"]


@frozen(kw_only=True)
class AlgorithmContext:
    """What the run loop lends to an algorithm."""

    tokenizer: Tokenizer
    resolve: Any
    """`resolve(kind, choice) -> object`: build the component that a `ComponentChoice` names."""
    max_sequence_length: int


@runtime_checkable
class Algorithm(Protocol):
    """A training method. A component of group `nemo_rl.algorithms`: `AlgorithmClass(config, context)`.

    Attributes:
        config_class: Root configuration class (a `RunConfig`) that `algorithm: <name>` picks.
        feed: "rollouts": each step consumes groups sampled by the policy; "examples": rows of a dataset.
        roles: Models beside the policy, of "reference", "critic", "teacher", "reward_model".
        loss: The objective.
    """

    config_class: ClassVar[type]
    feed: ClassVar[Literal["rollouts", "examples"]]
    loss: Loss

    @property
    def roles(self) -> frozenset[str]:
        """Models needed beside the policy, from the configuration."""
        ...

    @property
    def required_fields(self) -> frozenset[str]:
        """Fields the run loop computes with a forward pass before `finish_batch`.

        Of "logprobs" (the policy before this step's update) and "ref_logprobs" (the reference role).
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

    def finish_batch(self, batch: BatchedDataDict) -> Mapping[str, float]:
        """Add what needs `required_fields` (advantages), in place; return metrics of the batch."""
        ...

    def minibatches(self, batch: BatchedDataDict) -> Sequence[Sequence[int]]:
        """Sequence indices of each optimizer step of this batch, in order; one step by default."""
        ...


class BaseAlgorithm:
    """Defaults for an algorithm without other models or filters."""

    config_class: ClassVar[type]
    feed: ClassVar[Literal["rollouts", "examples"]] = "rollouts"
    loss: Loss

    def __init__(self, config: Any, context: AlgorithmContext) -> None:
        self.config = config
        self.context = context

    @property
    def roles(self) -> frozenset[str]:
        """None beside the policy."""
        return frozenset()

    @property
    def required_fields(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def keep_group(self, group: RolloutGroup) -> bool:
        """Keep every group."""
        return True

    def finish_batch(self, batch: BatchedDataDict) -> Mapping[str, float]:
        """Nothing to add."""
        return {}

    def minibatches(self, batch: BatchedDataDict) -> Sequence[Sequence[int]]:
        """The whole batch in one optimizer step."""
        return [range(len(batch))]
