"""The configuration tree: attrs classes, one place for each default.

`RunConfig` is what every run has; an algorithm's root class extends it. Names of components are chosen
here by name; their own options are structured by the class that the component names.
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
from nemo_rl_core.schema.validators import ge, gt, optional

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
    """Steps between validations; 0 is never."""
    at_start: bool = False
    """Validate before the first step."""
    at_end: bool = False
    """Validate after the last step."""
    max_samples: int = field(default=256, validator=ge(1))
    """Prompts of one validation at most."""
    num_generations_per_prompt: int = field(default=1, validator=ge(1))
    """Rollouts per prompt; more than one also gives pass@k for all of them."""
    temperature: float = field(default=0.0, validator=ge(0))
    """Divides the logits; 0 takes the most likely token."""
    max_new_tokens: int | None = field(default=None, validator=optional(ge(1)))
    """Tokens of one completion at most; None is `generation.max_new_tokens`."""


@frozen(kw_only=True)
class EvaluationConfig:
    """Scoring a model without training (`nemo-rl eval`). What is None is as in `validation`."""

    num_generations_per_prompt: int | None = field(default=None, validator=optional(ge(1)))
    """Rollouts per prompt, of which `pass_at` and `cons_at` look at k."""
    num_runs: int = field(default=1, validator=ge(1))
    """Times everything is sampled, each with seeds of its own; more than one also gives standard deviations."""
    temperature: float | None = field(default=None, validator=optional(ge(0)))
    """Divides the logits; 0 takes the most likely token."""
    max_new_tokens: int | None = field(default=None, validator=optional(ge(1)))
    """Tokens of one completion at most."""
    max_samples: int | None = field(default=None, validator=optional(ge(1)))
    """Prompts at most; None is every row."""
    pass_at: tuple[int, ...] = ()
    """Each k of pass@k, such as [1, 8]: a correct one among k rollouts; empty is 1 and the rollouts per prompt."""
    cons_at: tuple[int, ...] = ()
    """Each k of cons@k: the most frequent answer of k rollouts is correct; empty is the rollouts per prompt where the
    answers can be told."""
    correct_reward: float = 1.0
    """A rollout is correct if its reward is at least this."""
    answer_key: str = "extracted_answer"
    """Where the environment's `info` of a rollout has the answer that it votes for."""
    answer_pattern: str | None = None
    """Regular expression that finds the answer in the response instead: of its last match the last group."""
    subset_column: str | None = None
    """Column of the rows that names the subset of each; the scores of every subset are shown too."""


@frozen(kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    enabled: bool = True
    """Write checkpoints."""
    every: int = field(default=0, validator=ge(0))
    """Steps between checkpoints; 0 saves only at the end, on an interrupt and on a failure."""
    keep_last: int = field(default=2, validator=ge(1))
    """Newest checkpoints that are kept."""
    keep_best: int = field(default=0, validator=ge(0))
    """Checkpoints kept beside them because of their `metric`."""
    metric: str | None = None
    """Metric that ranks checkpoints for `keep_best`, such as `validation/accuracy`."""
    higher_is_better: bool = True
    """Whether a larger `metric` is the better one."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto continues from the newest valid checkpoint of `run_dir` if there is one."""
    export_model: bool = True
    """Write the final policy as a Hugging Face checkpoint to `<run_dir>/model`."""


@frozen(kw_only=True)
class LoggingConfig:
    """What is shown and written."""

    loggers: tuple[ComponentChoice, ...] = field(default=(), metadata={"kind": "loggers"})
    """Where metrics go beside the run folder, such as `[tensorboard]`."""
    progress: Literal["auto", "bar", "lines", "json", "none"] = "auto"
    """What the terminal shows: auto is a bar on a terminal, lines otherwise."""


@frozen(kw_only=True)
class InvariantsConfig:
    """Checks of a run; all on by default and cheap."""

    enabled: bool = True
    """Run the checks."""
    mismatch_warn: float = field(default=1.05, validator=gt(1))
    """Warn when mean exp|trainer logprob - engine logprob| exceeds this."""
    mismatch_abort: float | None = field(default=2.0, validator=optional(gt(1)))
    """Stop the run at this; None never."""
    zero_signal_steps: int = field(default=10, validator=ge(1))
    """Warn after this many steps in a row in which no group's rewards vary."""


@frozen(kw_only=True)
class RunConfig:
    """What every run has, whatever the algorithm. An algorithm's root class extends it."""

    algorithm: Any = None
    """Name of the algorithm; it picks the root configuration class."""
    model: str | None = field(default=None, metadata={"shorthand_for": "policy.model_name"})
    """Shorthand for `policy.model_name`."""
    learning_rate: float | None = field(
        default=None, validator=optional(ge(0)), metadata={"shorthand_for": "policy.optimizer.lr"}
    )
    """Shorthand for `policy.optimizer.lr`."""
    max_steps: int | None = field(default=None, validator=optional(ge(1)))
    """Steps of the run loop; None is decided by `max_epochs`."""
    max_epochs: int | None = field(default=None, validator=optional(ge(1)))
    """Passes over the training data; the run ends at whichever of the two comes first. None is 1, or as many as
    `max_steps` needs if that is set."""
    seed: int = 42
    """Everything random follows from it."""
    name: str | None = None
    """Name of the run; None is the algorithm's."""
    run_dir: str | None = None
    """Folder of checkpoints, metrics and rollouts; None is `runs/<name>`."""
    policy: PolicyConfig = Factory(PolicyConfig)
    """The model that is trained and the backend that trains it."""
    generation: GenerationConfig = Factory(GenerationConfig)
    """The engine that samples, and how it samples."""
    data: DataConfig = Factory(DataConfig)
    """Training and validation data."""
    environment: ComponentChoice = component("environments")
    """What answers and scores the policy; None takes the run's default or a plain reward."""
    reward: ComponentChoice = component("rewards")
    """A function that scores responses, used in place of the environment's score."""
    rollouts: RolloutConfig = Factory(RolloutConfig)
    """How episodes are run."""
    validation: ValidationConfig = Factory(ValidationConfig)
    """Validation during the run."""
    evaluation: EvaluationConfig = Factory(EvaluationConfig)
    """Scoring a model without training."""
    checkpointing: CheckpointConfig = Factory(CheckpointConfig)
    """Saving and resuming."""
    logging: LoggingConfig = Factory(LoggingConfig)
    """What is shown and written."""
    invariants: InvariantsConfig = Factory(InvariantsConfig)
    """Checks of a run."""
    cluster: ClusterConfig = Factory(ClusterConfig)
    """The machines."""
    weight_sync: ComponentChoice = component("weight_syncs")
    """How new weights reach the engine. None takes the default of where engines live: in the driver's process, or in
    processes of their own."""
    plugins: dict[str, str] = Factory(dict)
    """Bare name to qualified `dist:name` where two distributions provide one, as `{grpo: my-dist:grpo}`."""

    @property
    def num_items_per_step(self) -> int:
        """Prompts (or examples) consumed by one step; an algorithm's class overrides it."""
        raise NotImplementedError(f"{type(self).__name__} must define num_items_per_step")

    @property
    def num_updates_per_step(self) -> int:
        """Optimizer steps of one step, all passes together; an algorithm's class with minibatches overrides it."""
        return 1

    @property
    def num_passes_per_step(self) -> int:
        """Times the rollouts of one step are trained on; an algorithm's class with epochs overrides it."""
        return 1

    @property
    def group_size(self) -> int:
        """Rollouts per prompt; 1 for algorithms fed with examples."""
        return 1

    @property
    def max_batches_per_step(self) -> int:
        """Batches of prompts one step may sample until enough groups can be trained on."""
        return 10


@frozen(kw_only=True)
class RolloutRunConfig(RunConfig):
    """A run that is trained on rollouts: so many prompts in a step, so many rollouts of each."""

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
