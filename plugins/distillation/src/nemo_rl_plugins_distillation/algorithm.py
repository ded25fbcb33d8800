"""Distillation from teachers with the student's tokenizer: on the student's own rollouts, or on given answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from nemo_rl_core.data.prompts import sft_messages
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.algorithm import AlgorithmContext, BaseAlgorithm, ModelRole
from nemo_rl_plugins_distillation.config import DistillationConfig, OffPolicyDistillationConfig

if TYPE_CHECKING:
    from nemo_rl_core.data.batch import BatchedDataDict
    from nemo_rl_core.protocols.advantage import AdvantageEstimator
    from nemo_rl_core.protocols.algorithm import Model
    from nemo_rl_core.protocols.loss import Loss
    from nemo_rl_core.rollouts.records import RolloutGroup

__all__ = ["Distillation", "OffPolicyDistillation"]


class _Taught(BaseAlgorithm):
    """What both have: teachers, and the fields that the loss (or the estimator) wants of them."""

    served: ClassVar[frozenset[str]] = frozenset({"teacher_top_logprobs", "teacher_logprobs"})
    """Fields that a loss may require."""

    def __init__(self, config: Any, context: AlgorithmContext) -> None:
        from nemo_rl_plugins_distillation.teachers import Teachers

        super().__init__(config, context)
        self.loss: Loss = context.resolve("losses", config.loss)
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

    def check_tokenizers(self) -> None:
        """Refuse a teacher whose token ids mean something else than the student's."""
        from nemo_rl_plugins_distillation.teachers import check_same_tokenizer

        policy = self.config.policy
        check_same_tokenizer(self.context.tokenizer, self.config.by_name, policy.tokenizer_name or policy.model_name)

    @property
    def models(self) -> Mapping[str, ModelRole]:
        """The teachers; and, for a loss with a KL to it, the student as it was before the run."""
        reference = {"reference": ModelRole(config=self.config.policy)} if "ref_logprobs" in self._fields else {}
        return {**self._teachers.roles, **reference}

    @property
    def required_fields(self) -> frozenset[str]:
        """Those of the loss that the core knows; without `logprobs`, as each rollout takes one optimizer step."""
        return self._fields & {"ref_logprobs"}

    def fill_batch(self, batch: BatchedDataDict, models: Mapping[str, Model]) -> None:
        """Add what the teachers say: their likeliest tokens, or the logprobs of the batch's own tokens."""
        super().fill_batch(batch, models)
        if "teacher_top_logprobs" in self._fields:
            self._teachers.fill_top(batch, models, self.config.top_k)
        if "teacher_logprobs" in self._fields:
            self._teachers.fill_logprobs(batch, models)


class Distillation(_Taught):
    """On-policy distillation (GKD, arXiv:2306.13649): the student samples, the teachers say what they would have said.

    Nothing is differentiated through the sampling. With an advantage estimator (`on_policy_distillation`) and a
    policy-gradient loss only the teachers' logprobs of the sampled tokens are asked for.
    """

    config_class: ClassVar[type] = DistillationConfig
    feed: ClassVar[Literal["rollouts", "examples"]] = "rollouts"
    learns_from_rewards: ClassVar[bool] = False

    def __init__(self, config: DistillationConfig, context: AlgorithmContext) -> None:
        super().__init__(config, context)
        self.advantages: AdvantageEstimator | None = None
        if config.advantage.name is not None:
            self.advantages = context.resolve("advantages", config.advantage)
            self._fields |= frozenset(getattr(self.advantages, "required_fields", ()))
        compares = "teacher_top_logprobs" in self._fields
        if compares == (self.advantages is not None):
            fix = "remove `advantage`" if compares else "set `advantage: on_policy_distillation`"
            raise ConfigError(
                f"The loss {config.loss.name!r} {'compares distributions' if compares else 'reads advantages'}, but "
                f"`advantage` is {config.advantage.name!r}. To keep this loss, {fix}."
            )

    def build_batch(self, items: Sequence[RolloutGroup]) -> BatchedDataDict:
        """The sequences of all groups, each with its teachers."""
        from nemo_rl_core.data.from_rollouts import batch_from_groups

        batch = batch_from_groups(items)
        self._teachers.assign(batch, [r.task for group in items for r in group.valid for _ in r.segments])
        return batch

    def finish_batch(self, batch: BatchedDataDict) -> Mapping[str, float]:
        """Add `advantages` [N] if there is an estimator; `teacher_logprob_gap` is minus their mean over the tokens."""
        if self.advantages is None:
            return {}
        advantages = self.advantages(batch)
        batch.set_tokens("advantages", advantages)
        return {"teacher_logprob_gap": -float(advantages.sum()) / max(int(batch["loss_mask"].sum()), 1)}


class OffPolicyDistillation(_Taught):
    """Distillation on conversations and prompt/response rows: the answers are given, the targets are the teachers'."""

    config_class: ClassVar[type] = OffPolicyDistillationConfig
    feed: ClassVar[Literal["rollouts", "examples"]] = "examples"

    def __init__(self, config: OffPolicyDistillationConfig, context: AlgorithmContext) -> None:
        from nemo_rl_core.data.encoding import ConversationEncoder

        super().__init__(config, context)
        if not self._fields & self.served - {"teacher_logprobs"}:
            raise ConfigError(
                f"The loss {config.loss.name!r} compares nothing with a teacher. Choose one that does, such as "
                "mixed_kl (projected_kl for a teacher of another tokenizer), or algorithm: sft."
            )
        self._encoder = ConversationEncoder(
            context.tokenizer,
            max_length=context.max_sequence_length,
            train_on=config.train_on,
            chat_template_kwargs=config.data.chat_template_kwargs,
        )

    def build_batch(self, items: Sequence[Mapping[str, Any]]) -> BatchedDataDict:
        """Tokenise rows, each with its teachers.

        Raises:
            DataError: A row is not a conversation, has no token, or names no teacher.
        """
        rows = enumerate(items)
        batch = self._encoder.batch([sft_messages(row, where=f"example {i} of the batch") for i, row in rows])
        self._teachers.assign(batch, items)
        return batch
