"""Configuration of distillation: every default in one place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from attrs import Factory, evolve, field, frozen

from nemo_rl_core.schema import ComponentChoice, PolicyConfig, RolloutRunConfig, RunConfig, component
from nemo_rl_core.schema.validators import ge, le, one_of, optional

__all__ = ["CrossTokenizerConfig", "DistillationConfig", "OffPolicyDistillationConfig", "TeacherConfig"]

TrainOn = Literal["assistant", "last_assistant", "all"]


@frozen(kw_only=True)
class TeacherConfig:
    """A model to learn from; what is not set is as for the policy."""

    model_name: str | None = None
    """Hub name, local folder, or `scratch:<name>`."""
    tokenizer_name: str | None = None
    """None is the model's own."""
    weight: float = field(default=1.0, validator=ge(0))
    """Weight among several teachers; the weights are divided by their sum."""
    backend: Any = None
    """Training backend that runs it; None is the policy's."""
    options: Any = field(factory=dict)
    """Settings of the backend; none are the policy's if the backend is."""
    precision: Literal["float32", "bfloat16"] | None = None
    """None is the policy's."""
    num_workers: int | None = field(default=None, validator=optional(ge(1)))
    """None is the policy's."""
    tensor_parallel_size: int | None = field(default=None, validator=optional(ge(1)))
    """None is the policy's."""
    max_tokens_per_microbatch: int | None = field(default=None, validator=optional(ge(1)))
    """Tokens of one forward pass; None is the policy's."""

    def as_model(self, policy: PolicyConfig) -> PolicyConfig:
        """The configuration of the model that a backend runs."""
        own = ("precision", "num_workers", "tensor_parallel_size", "max_tokens_per_microbatch")
        changes = {name: getattr(self, name) for name in own if getattr(self, name) is not None}
        if self.backend is not None or self.options:
            changes.update(backend=self.backend or policy.backend, options=self.options)
        return evolve(policy, model_name=self.model_name, tokenizer_name=self.tokenizer_name, head="lm", **changes)


@frozen(kw_only=True, slots=False)  # two bases with slots of their own cannot be joined below
class _TaughtConfig(RunConfig):
    """What every distillation has."""

    teacher: TeacherConfig = Factory(TeacherConfig)
    """The teacher, or:"""
    teachers: dict[str, TeacherConfig] = Factory(dict)
    """several by name, each with the fields of `teacher`, in place of it."""
    teacher_column: str | None = None
    """Column of the data that names the teacher of a row, one of `teachers`; None asks all of them about every row."""
    top_k: int | None = field(default=64, validator=optional(ge(1)))
    """Likeliest tokens of a teacher that are compared; null compares the whole vocabulary, chunk by chunk."""
    loss: ComponentChoice = component("losses", "mixed_kl")
    """The objective."""

    @property
    def by_name(self) -> dict[str, TeacherConfig]:
        """The teachers."""
        return self.teachers or {"teacher": self.teacher}

    def check(self) -> Iterator[Any]:
        """Yield every mistake that lies between fields, each with its path, value and fix."""
        from nemo_rl_plugins_distillation.checks import find_mistakes

        return find_mistakes(self)


@frozen(kw_only=True)
class DistillationConfig(_TaughtConfig, RolloutRunConfig):
    """A run of on-policy distillation: `algorithm: distillation`."""

    algorithm: Any = "distillation"
    num_prompts_per_step: int = field(default=128, validator=ge(1))
    """Prompts of one step."""
    num_generations_per_prompt: int = field(default=1, validator=ge(1))
    """Rollouts of one prompt."""
    advantage: ComponentChoice = component("advantages")
    """An advantage estimator, such as `on_policy_distillation`, for a `loss` that takes policy-gradient steps."""
    reward: ComponentChoice = component("rewards", "unscored")
    """A function that scores responses, for the metrics; nothing is learnt from it."""
    lmbda: float = field(default=1.0, validator=[ge(0), le(1)])
    """Share of the steps that train on the student's samples (drawn for each step from the seed); the others train on
    the answers of the data. 0 samples nothing and starts no engine."""
    train_on: TrainOn = field(default="assistant", validator=one_of("assistant", "last_assistant", "all"))
    """Tokens of the data's answers that are trained, as in off_policy_distillation."""

    @property
    def feed(self) -> Literal["rollouts", "examples"]:
        """What the run is fed with."""
        return "rollouts" if self.lmbda > 0 else "examples"


@frozen(kw_only=True)
class OffPolicyDistillationConfig(_TaughtConfig):
    """A run of distillation on given answers: `algorithm: off_policy_distillation`."""

    algorithm: Any = "off_policy_distillation"
    batch_size: int = field(default=32, validator=ge(1))
    """Examples of one optimizer step."""
    train_on: TrainOn = field(default="assistant", validator=one_of("assistant", "last_assistant", "all"))
    """Tokens that are trained: those of every assistant turn, of the last one only, or the whole text."""

    @property
    def num_items_per_step(self) -> int:
        """Examples of one step."""
        return self.batch_size


@frozen(kw_only=True)
class CrossTokenizerConfig(OffPolicyDistillationConfig):
    """A run with a teacher of another tokenizer: `algorithm: cross_tokenizer_distillation`."""

    algorithm: Any = "cross_tokenizer_distillation"
    loss: ComponentChoice = component("losses", "projected_kl")
    """The objective."""
    teacher_chat_template: str | None = None
    """A Jinja chat template for the teacher, or the path of one; None is its tokenizer's."""
    projection: str | None = None
    """File of a projection between the vocabularies (see the README); None makes one from the tokens' texts."""
    max_preimages: int = field(default=32, validator=ge(1))
    """Tokens of the student that are projected onto one of the teacher's; those of the largest weight."""
    lmbda: float = field(default=0.0, validator=[ge(0), le(1)])
    """Share of the steps that train on the student's samples, which are tokenised again for the teacher (drawn for
    each step from the seed); the others train on the answers of the data. 0 starts no engine."""
    reward: ComponentChoice = component("rewards", "unscored")
    """A function that scores samples, for the metrics; nothing is learnt from it."""

    @property
    def feed(self) -> Literal["rollouts", "examples"]:
        """What the run is fed with."""
        return "rollouts" if self.lmbda > 0 else "examples"
