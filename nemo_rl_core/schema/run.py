"""Root of the configuration tree, and the settings of a run as a whole.

`RunConfig` has the fields of every run; an algorithm's root class extends it. Components are chosen by name. Their
options are structured by the class that the component names.
"""

from __future__ import annotations

from typing import Any, Literal

from attrs import Factory, field, frozen

from nemo_rl_core.schema.choice import ComponentChoice, component
from nemo_rl_core.schema.cluster import ClusterConfig
from nemo_rl_core.schema.data import DataConfig
from nemo_rl_core.schema.generation import GenerationConfig
from nemo_rl_core.schema.model import PolicyConfig
from nemo_rl_core.schema.rollouts import RolloutConfig
from nemo_rl_core.schema.validators import ge, gt, optional, refuse_unread

__all__ = [
    "CheckpointConfig",
    "EvaluationConfig",
    "InvariantsConfig",
    "LoggingConfig",
    "RolloutRunConfig",
    "RunConfig",
    "ValidationConfig",
]


@frozen(kw_only=True)
class ValidationConfig:
    """Validation during the run."""

    every: int = field(default=0, validator=ge(0))
    """Steps between validations; 0 never validates."""
    at_start: bool = False
    """Whether to validate before the first step."""
    at_end: bool = False
    """Whether to validate after the last step."""
    max_samples: int = field(default=256, validator=ge(1))
    """Maximum prompts of one validation."""
    num_generations_per_prompt: int = field(default=1, validator=ge(1))
    """Rollouts per prompt. With n > 1, pass@n is reported too."""
    temperature: float = field(default=0.0, validator=ge(0))
    """Divisor of the logits; 0 takes the most likely token."""
    max_new_tokens: int | None = field(default=None, validator=optional(ge(1)))
    """Maximum tokens of one completion. None takes `generation.max_new_tokens`."""


@frozen(kw_only=True)
class EvaluationConfig:
    """Evaluation of a model without training (`nemo-rl eval`). A setting of None takes the value of `validation`."""

    num_generations_per_prompt: int | None = field(default=None, validator=optional(ge(1)))
    """Rollouts per prompt; the k of `pass_at` and `cons_at` cannot exceed it. None takes the value of `validation`."""
    num_runs: int = field(default=1, validator=ge(1))
    """Number of times to sample everything, each with its own seeds. More than one gives standard deviations too."""
    temperature: float | None = field(default=None, validator=optional(ge(0)))
    """Divisor of the logits; 0 takes the most likely token. None takes the value of `validation`."""
    max_new_tokens: int | None = field(default=None, validator=optional(ge(1)))
    """Maximum tokens of one completion. None takes the value of `validation`."""
    max_samples: int | None = field(default=None, validator=optional(ge(1)))
    """Maximum prompts. None takes every row."""
    pass_at: tuple[int, ...] = ()
    """Values of k for pass@k, the chance that one of k rollouts is correct, such as [1, 8]. By default, 1 and the
    rollouts per prompt."""
    cons_at: tuple[int, ...] = ()
    """Values of k for cons@k, the chance that the most frequent answer of k rollouts is correct. By default, the
    rollouts per prompt if answers are available."""
    correct_reward: float = 1.0
    """Smallest reward of a correct rollout."""
    answer_key: str = "extracted_answer"
    """Key of a rollout's answer in the environment's `info`, for cons@k."""
    answer_pattern: str | None = None
    """Regular expression that finds the answer in the response instead, as the last group of its last match."""
    subset_column: str | None = None
    """Column that names the subset of each row. The scores of every subset are shown too."""


@frozen(kw_only=True)
class CheckpointConfig:
    """Checkpoints: saving, keeping and resuming."""

    enabled: bool = True
    """Whether to write checkpoints."""
    every: int = field(default=0, validator=ge(0))
    """Steps between checkpoints; 0 saves only at the end, on an interrupt and on a failure."""
    keep_last: int = field(default=2, validator=ge(1))
    """Number of newest checkpoints to keep."""
    keep_best: int = field(default=0, validator=ge(0))
    """Number of further checkpoints to keep, those with the best `metric`."""
    metric: str | None = None
    """Metric that ranks checkpoints for `keep_best`, such as `validation/accuracy`."""
    higher_is_better: bool = True
    """Whether a larger `metric` is better."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Whether to resume from the newest valid checkpoint of `run_dir`: auto does if there is one, must fails if there
    is none, never starts anew."""
    export_model: bool = True
    """Whether to write the final policy as a Hugging Face checkpoint to `<run_dir>/model`."""


@frozen(kw_only=True)
class LoggingConfig:
    """Loggers, progress and samples."""

    loggers: tuple[ComponentChoice, ...] = field(default=(), metadata={"kind": "loggers"})
    """Loggers that get the metrics in addition to the run folder, such as `[tensorboard]`."""
    progress: Literal["auto", "bar", "lines", "json", "none"] = "auto"
    """Form of progress on the standard output. auto shows a bar on a terminal and lines elsewhere."""


@frozen(kw_only=True)
class InvariantsConfig:
    """Cheap checks during a run, on by default."""

    enabled: bool = True
    """Whether to run the checks."""
    mismatch_warn: float = field(default=1.05, validator=gt(1))
    """Mean exp|trainer logprob - engine logprob| above which the run warns."""
    mismatch_abort: float | None = field(default=2.0, validator=optional(gt(1)))
    """Mean exp|trainer logprob - engine logprob| above which the run stops. None never stops it."""
    zero_signal_steps: int = field(default=10, validator=ge(1))
    """Steps in a row without any variance of rewards within a group after which the run warns."""


_READ_AS = {"num_generations_per_prompt": "group_size", "num_prompts_per_step": "num_items_per_step"}
"""Settings of `RolloutRunConfig`, and the property by which a run reads each."""


@frozen(kw_only=True)
class RunConfig:
    """Settings of every run. An algorithm's root class extends it."""

    algorithm: Any = None
    """Name of the algorithm. It determines the root configuration class."""
    model: str | None = field(default=None, metadata={"shorthand_for": "policy.model_name"})
    """Shorthand for `policy.model_name`."""
    learning_rate: float | None = field(
        default=None, validator=optional(ge(0)), metadata={"shorthand_for": "policy.optimizer.lr"}
    )
    """Shorthand for `policy.optimizer.lr`."""
    max_steps: int | None = field(default=None, validator=optional(ge(1)))
    """Maximum steps of the run loop. None leaves the end to `max_epochs`."""
    max_epochs: int | None = field(default=None, validator=optional(ge(1)))
    """Maximum passes over the training data. The run ends at whichever limit comes first. None means 1, or as many as
    `max_steps` needs if that is set."""
    seed: int = 42
    """Seed of everything random."""
    name: str | None = None
    """Name of the run. None takes the algorithm's."""
    run_dir: str | None = None
    """Folder for checkpoints, metrics and rollouts. None means `runs/<name>`."""
    policy: PolicyConfig = Factory(PolicyConfig)
    """Model to train, and the backend that trains it."""
    generation: GenerationConfig = Factory(GenerationConfig)
    """Engine that samples completions, and its sampling settings."""
    data: DataConfig = Factory(DataConfig)
    """Training and validation data."""
    environment: ComponentChoice = component("environments")
    """Environment that answers and scores the policy. None means the algorithm's default, or a plain reward."""
    reward: ComponentChoice = component("rewards")
    """Function that scores responses in place of the environment."""
    rollouts: RolloutConfig = Factory(RolloutConfig)
    """Limits, deadlines and order of episodes."""
    validation: ValidationConfig = Factory(ValidationConfig)
    """Validation during the run."""
    evaluation: EvaluationConfig = Factory(EvaluationConfig)
    """Evaluation of a model without training."""
    checkpointing: CheckpointConfig = Factory(CheckpointConfig)
    """Checkpoints: saving, keeping and resuming."""
    logging: LoggingConfig = Factory(LoggingConfig)
    """Loggers, progress and samples."""
    invariants: InvariantsConfig = Factory(InvariantsConfig)
    """Cheap checks during a run."""
    cluster: ClusterConfig = Factory(ClusterConfig)
    """Machines and devices of the run."""
    weight_sync: ComponentChoice = component("weight_syncs")
    """Component that transfers new weights to the engine. None takes the default for the engine's place: the driver's
    process, or separate processes."""
    plugins: dict[str, str] = Factory(dict)
    """Qualified `dist:name` of a bare name that two distributions provide, such as `{grpo: my-dist:grpo}`."""

    def __init_subclass__(cls, **keywords: object) -> None:
        """Refuse a class whose settings the run would pass over.

        Raises:
            ConfigError: Says which, and what to write instead.
        """
        super().__init_subclass__(**keywords)
        refuse_unread(cls, RunConfig, _READ_AS)

    @property
    def num_items_per_step(self) -> int:
        """Prompts (or examples) of one step; an algorithm's class overrides it."""
        raise NotImplementedError(f"{type(self).__name__} must define num_items_per_step")

    @property
    def num_updates_per_step(self) -> int:
        """Optimizer steps in one step, over all passes; an algorithm's class with minibatches overrides it."""
        return 1

    @property
    def num_passes_per_step(self) -> int:
        """Passes over the rollouts of one step; an algorithm's class with epochs overrides it."""
        return 1

    @property
    def group_size(self) -> int:
        """Rollouts per prompt; 1 for algorithms fed with examples."""
        return 1

    @property
    def max_batches_per_step(self) -> int:
        """Maximum batches of prompts that one step may sample to get enough groups to train on."""
        return 10


@frozen(kw_only=True)
class RolloutRunConfig(RunConfig):
    """Settings of a run that trains on rollouts: a number of prompts per step, and of rollouts per prompt."""

    num_prompts_per_step: int = field(default=32, validator=ge(1))
    """Prompts (groups) of one step."""
    num_generations_per_prompt: int = field(default=16, validator=ge(1))
    """Rollouts of one prompt (group size)."""

    @property
    def num_items_per_step(self) -> int:
        """Prompts of one step."""
        return self.num_prompts_per_step

    @property
    def group_size(self) -> int:
        """Rollouts per prompt."""
        return self.num_generations_per_prompt
