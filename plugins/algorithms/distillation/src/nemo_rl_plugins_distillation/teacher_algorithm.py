"""What all distillation algorithms have in common: teachers, and batches of rollouts or of the rows of the data.

Legend: B sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from nemo_rl_core.data.prompts import sft_messages
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.algorithm import AlgorithmContext, BaseAlgorithm, ModelRole
from nemo_rl_core.records.rollout import RolloutGroup

if TYPE_CHECKING:
    from nemo_rl_core.protocols.algorithm import Model
    from nemo_rl_core.protocols.loss import Loss
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_core.records.message import Message
    from nemo_rl_plugins_distillation.whole_vocabulary import WholeVocabulary

__all__ = ["TeacherAlgorithm", "conversations", "takes_rollouts"]

_BITS = 53


def takes_rollouts(lmbda: float, *, seed: int, step: int) -> bool:
    """Whether a step trains on the student's samples: with probability `lmbda`, the same whenever it is asked.

    Source: GKD, arXiv:2306.13649 algorithm 1, which draws once for each step.

    Args:
        lmbda: Share of steps.
        seed: Of the run.
        step: Steps done before it.
    """
    from nemo_rl_core.records.seeds import stable_seed

    bound: int = 2**_BITS
    return stable_seed(seed, "lmbda", step, bits=_BITS) < lmbda * bound


class TeacherAlgorithm(BaseAlgorithm):
    """Base of algorithms with teachers: adds the fields of teachers that the loss or the estimator needs."""

    served: ClassVar[frozenset[str]] = frozenset({"teacher_top_logprobs", "teacher_hidden", "teacher_logprobs"})
    """Fields that a loss may require."""
    learns_from_rewards: ClassVar[bool] = False

    def __init__(self, config: Any, context: AlgorithmContext) -> None:
        from nemo_rl_core.data.encoding import ConversationEncoder
        from nemo_rl_plugins_distillation.teachers import Teachers

        super().__init__(config, context)
        self.loss: Loss = self._make_loss()
        self._fields: frozenset[str] = frozenset(getattr(self.loss, "required_fields", ()))
        self._teachers = Teachers(config.by_name, config.policy, column=config.teacher_column)
        if unknown := self._fields - self.served - {"logprobs", "ref_logprobs"}:
            raise ConfigError(
                f"The loss {config.loss.name!r} reads {', '.join(sorted(unknown))}, which the algorithm "
                f"{config.algorithm!r} does not make. Losses for a teacher of another tokenizer (projected_kl, "
                "sorted_probabilities) belong to cross_tokenizer_distillation, the others to distillation and "
                "off_policy_distillation."
            )
        self.check_tokenizers()
        self._encoder = ConversationEncoder(
            context.tokenizer,
            max_length=context.max_sequence_length,
            train_on=config.train_on,
            chat_template_kwargs=config.data.chat_template_kwargs,
        )

    def _make_loss(self) -> Loss:
        """The loss that the configuration names, over the whole vocabulary if there is no `top_k`."""
        from nemo_rl_plugins_distillation.whole_vocabulary import WholeVocabulary

        loss = self.context.resolve("losses", self.config.loss)
        compares = "teacher_top_logprobs" in getattr(loss, "required_fields", ())
        return WholeVocabulary(loss) if compares and self.config.top_k is None else loss

    def check_tokenizers(self) -> None:
        """Refuse a teacher whose token ids mean something else than the student's."""
        from nemo_rl_plugins_distillation.teachers import check_same_tokenizer

        policy = self.config.policy
        check_same_tokenizer(self.context.tokenizer, self.config.by_name, policy.tokenizer_name or policy.model_name)

    @property
    def models(self) -> Mapping[str, ModelRole]:
        """The teachers; and, for a loss with a KL to it, the student as it was before the run."""
        reference = {"reference": ModelRole(config=self.config.policy)} if "ref_logprobs" in self._fields else {}
        whole = "teacher_hidden" in self._fields
        return {**self._teachers.roles(frozenset({"over_vocabulary"}) if whole else frozenset()), **reference}

    @property
    def required_fields(self) -> frozenset[str]:
        """Those of the loss that the core knows; without `logprobs`, as each rollout takes one optimizer step."""
        return self._fields & {"ref_logprobs"}

    def samples(self, step: int) -> bool:
        """Whether a step trains on rollouts, see `takes_rollouts`."""
        return takes_rollouts(self.config.lmbda, seed=self.config.seed, step=step)

    def build_batch(self, items: Sequence[RolloutGroup] | Sequence[Mapping[str, Any]]) -> BatchedDataDict:
        """The sequences of all groups, or the tokenised rows, each with its teachers.

        Raises:
            DataError: A row is not a conversation, has no token, or names no teacher.
        """
        from nemo_rl_core.records.to_batch import batch_from_groups

        groups = [item for item in items if isinstance(item, RolloutGroup)]
        if groups:
            batch = batch_from_groups(groups)
            rows = [r.task for group in groups for r in group.valid for _ in r.segments]
        else:
            rows = [dict(item) for item in items if not isinstance(item, RolloutGroup)]
            batch = self._encoder.batch(conversations(rows))
        self._teachers.assign(batch, rows)
        return batch

    def finish_batch(self, batch: BatchedDataDict) -> Mapping[str, float]:
        """`on_policy`, 1 in a step on rollouts and 0 in one on rows, where both happen."""
        mixes = 0 < getattr(self.config, "lmbda", 0) < 1
        return {"on_policy": float("rollout_logprobs" in batch)} if mixes else {}

    def fill_batch(self, batch: BatchedDataDict, models: Mapping[str, Model]) -> None:
        """Add what the teachers say: their likeliest tokens, hidden states, or the batch's own tokens' logprobs."""
        super().fill_batch(batch, models)
        if "teacher_top_logprobs" in self._fields:
            self._teachers.fill_top(batch, models, self.config.top_k)
        if "teacher_hidden" in self._fields:
            self._teachers.fill_hidden(batch, models, cast("WholeVocabulary", self.loss))
        if "teacher_logprobs" in self._fields:
            self._teachers.fill_logprobs(batch, models)


def conversations(rows: Sequence[Mapping[str, Any]]) -> list[list[Message]]:
    """What there is to learn from in rows of the data."""
    return [sft_messages(row, where=f"example {i} of the batch") for i, row in enumerate(rows)]
