"""Distillation from teachers with the student's tokenizer: on the student's own rollouts, or on given answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.algorithm import AlgorithmContext
from nemo_rl_plugins_distillation.config import DistillationConfig, OffPolicyDistillationConfig
from nemo_rl_plugins_distillation.example import example_off_policy, example_on_policy
from nemo_rl_plugins_distillation.teacher_algorithm import TeacherAlgorithm

if TYPE_CHECKING:
    from nemo_rl_core.protocols.advantage import AdvantageEstimator
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["Distillation", "OffPolicyDistillation"]

_COMPARED = frozenset({"teacher_top_logprobs", "teacher_hidden"})


class Distillation(TeacherAlgorithm):
    """On-policy distillation (GKD, arXiv:2306.13649): the student samples, the teachers say what they would have said.

    In a share `1 - lmbda` of the steps the answers of the data are taken in place of samples; with none sampled no
    engine is started. Nothing is differentiated through the sampling. With an advantage estimator
    (`on_policy_distillation`) and a policy-gradient loss only the teachers' logprobs of the sampled tokens are asked.
    """

    config_class: ClassVar[type] = DistillationConfig
    feed: ClassVar[Literal["rollouts", "examples"]] = "rollouts"
    example: ClassVar[Callable[[Path], Mapping[str, Any]]] = staticmethod(example_on_policy)

    def __init__(self, config: DistillationConfig, context: AlgorithmContext) -> None:
        super().__init__(config, context)
        self.advantages: AdvantageEstimator | None = None
        if config.advantage.name is not None:
            self.advantages = context.resolve("advantages", config.advantage)
            self._fields |= frozenset(getattr(self.advantages, "required_fields", ()))
        compares = bool(_COMPARED & self._fields)
        if compares == (self.advantages is not None):
            fix = "remove `advantage`" if compares else "set `advantage: on_policy_distillation`"
            raise ConfigError(
                f"The loss {config.loss.name!r} {'compares distributions' if compares else 'reads advantages'}, but "
                f"`advantage` is {config.advantage.name!r}. To keep this loss, {fix}."
            )

    @property
    def takes_stale_rollouts(self) -> bool:
        """Distributions are compared on any text; a policy gradient needs a loss that corrects for older weights."""
        return self.advantages is None or bool(getattr(self.loss, "corrects_importance", False))

    def finish_batch(self, batch: BatchedDataDict) -> Mapping[str, float]:
        """Add `advantages` [N] if there is an estimator; `teacher_logprob_gap` is minus their mean over the tokens."""
        if self.advantages is None:
            return super().finish_batch(batch)
        advantages = self.advantages(batch)
        batch.set_tokens("advantages", advantages)
        return {"teacher_logprob_gap": -float(advantages.sum()) / max(int(batch["loss_mask"].sum()), 1)}


class OffPolicyDistillation(TeacherAlgorithm):
    """Distillation on conversations and prompt/response rows: the answers are given, the targets are the teachers'."""

    config_class: ClassVar[type] = OffPolicyDistillationConfig
    feed: ClassVar[Literal["rollouts", "examples"]] = "examples"
    example: ClassVar[Callable[[Path], Mapping[str, Any]]] = staticmethod(example_off_policy)

    def __init__(self, config: OffPolicyDistillationConfig, context: AlgorithmContext) -> None:
        super().__init__(config, context)
        if not self._fields & self.served - {"teacher_logprobs"}:
            raise ConfigError(
                f"The loss {config.loss.name!r} compares nothing with a teacher. Choose one that does, such as "
                "mixed_kl (projected_kl for a teacher of another tokenizer), or algorithm: sft."
            )
