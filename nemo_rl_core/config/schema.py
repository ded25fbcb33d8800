"""The configuration tree: attrs classes, one place for each default.

`RunConfig` is what every run has; an algorithm's root class extends it. Names of components are chosen
here by name; their own options are structured by the class that the component names.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from attrs import Factory, field, frozen
from attrs.validators import ge, gt, in_, le, optional

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "ComponentChoice",
    "DataConfig",
    "DatasetConfig",
    "GenerationConfig",
    "InvariantsConfig",
    "LoggingConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "RolloutConfig",
    "RunConfig",
    "SchedulerConfig",
    "ValidationConfig",
    "component",
]


@frozen(kw_only=True)
class ComponentChoice:
    """A component chosen by name, with its own options.

    In a file either the bare name (`environment: math`) or `{name: ..., options: {...}}`; in Python also
    the component itself. Fields of this type carry `metadata={"kind": <kind>}`.
    """

    name: Any = None
    """`name`, `dist:name`, `module:attr` or a Python object; None is the installed default of the kind."""
    options: Any = Factory(dict)
    """Structured by the component's `config_class`."""


def component(kind: str, default: str | None = None) -> Any:
    """An attrs field that chooses a component of `kind`."""
    return field(default=ComponentChoice(name=default), metadata={"kind": kind})


@frozen(kw_only=True)
class OptimizerConfig:
    """The optimizer of the policy."""

    name: str = "torch.optim.AdamW"
    """Any `torch.optim` class, or another by import path."""
    lr: float = field(default=1e-6, validator=ge(0))
    weight_decay: float = field(default=0.01, validator=ge(0))
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = field(default=1e-8, validator=gt(0))
    options: dict[str, Any] = Factory(dict)
    """Further keyword arguments; `betas` and `eps` are passed only if the class takes them."""


@frozen(kw_only=True)
class SchedulerConfig:
    """Learning rate over optimizer steps."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = field(default=0, validator=ge(0))
    total_steps: int | None = field(default=None, validator=optional(gt(0)))
    """Steps to the end of the decay; None takes the run's `max_steps`."""
    min_lr_ratio: float = field(default=0.0, validator=[ge(0), le(1)])
    """Final learning rate as a share of `optimizer.lr`."""


@frozen(kw_only=True)
class PolicyConfig:
    """The model that is trained and the backend that trains it."""

    model_name: str | None = None
    """Hub name, local folder, or `scratch:<name or folder>` for random weights of a shipped shape."""
    tokenizer_name: str | None = None
    """None is the model's own."""
    backend: Any = None
    """Training backend: name, `dist:name`, `module:attr` or class; None is the installed default."""
    options: Any = field(factory=dict, metadata={"options_of": ("training_backends", "backend")})
    precision: Literal["float32", "bfloat16"] = "float32"
    num_workers: int = field(default=1, validator=ge(1))
    """Processes (one per device) that train the policy."""
    tensor_parallel_size: int = field(default=1, validator=ge(1))
    max_sequence_length: int = field(default=2048, validator=ge(2))
    """Tokens of prompt and completions together; a longer prompt is a recorded failure."""
    max_tokens_per_microbatch: int = field(default=16384, validator=ge(1))
    """Token budget of one forward-backward; a longer sequence goes alone."""
    activation_checkpointing: bool = False
    max_grad_norm: float | None = field(default=1.0, validator=optional(gt(0)))
    logprob_chunk_size: int = field(default=1024, validator=ge(1))
    """Tokens whose [chunk, V] logits are held at a time."""
    optimizer: OptimizerConfig = Factory(OptimizerConfig)
    scheduler: SchedulerConfig = Factory(SchedulerConfig)


@frozen(kw_only=True)
class GenerationConfig:
    """The engine that samples, and how it samples."""

    model_name: str | None = None
    """Filled from the policy; do not set it."""
    backend: Any = None
    options: Any = field(factory=dict, metadata={"options_of": ("generation_backends", "backend")})
    precision: Literal["float32", "bfloat16"] | None = None
    """None is the policy's."""
    max_new_tokens: int = field(default=512, validator=ge(1))
    temperature: float = field(default=1.0, validator=ge(0))
    top_p: float = field(default=1.0, validator=[gt(0), le(1)])
    top_k: int = field(default=0, validator=ge(0))
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_sequence_length: int | None = None
    """None is the policy's."""


@frozen(kw_only=True)
class DatasetConfig:
    """Where rows come from and how a row becomes a prompt."""

    source: Any = None
    """Dataset component (`huggingface`, `jsonl`, ...), a file or folder or hub name (the source is told from
    it), or rows in Python."""
    options: Any = field(factory=dict, metadata={"options_of": ("datasets", "source")})
    columns: dict[str, str] = Factory(dict)
    """Our name to the column's name in the data, such as `{prompt: question, answer: solution}`."""
    prompt_template: str | None = None
    """Python format string over the row's columns, such as "Solve: {question}"."""
    system_prompt: str | None = None
    limit: int | None = field(default=None, validator=optional(ge(1)))
    """Use only the first rows."""


@frozen(kw_only=True)
class DataConfig:
    """Training and validation data."""

    train: DatasetConfig = Factory(DatasetConfig)
    validation: DatasetConfig | None = None
    shuffle: bool = True
    chat_template: str | None = None
    """A Jinja chat template, or the path of one; None is the tokenizer's. Without any, the contents of
    the messages are joined as they are."""
    chat_template_kwargs: dict[str, Any] = Factory(dict)


@frozen(kw_only=True)
class RolloutConfig:
    """How episodes are run."""

    max_turns: int = field(default=1, validator=ge(1))
    max_in_flight: int = field(default=1024, validator=ge(1))
    """Episodes admitted at a time."""
    staleness: int = field(default=0, validator=ge(0))
    """Optimizer steps the weights that sampled may lie behind; 0 is synchronous on-policy training."""
    generation_timeout_s: float = field(default=600.0, validator=gt(0))
    """Deadline of one completion."""
    environment_timeout_s: float = field(default=120.0, validator=gt(0))
    """Deadline of one reset or step."""
    reward_timeout_s: float = field(default=30.0, validator=gt(0))
    """Deadline of one call in the process pool; the process is killed at it."""
    num_reward_workers: int = field(default=1, validator=ge(1))
    max_failed_fraction: float = field(default=0.5, validator=[ge(0), le(1)])
    """The run stops, naming the errors, when more of a step's rollouts than this fail."""
    record: bool = True
    """Write every rollout to `rollouts/step_<n>.jsonl` in the run folder."""


@frozen(kw_only=True)
class ValidationConfig:
    """Validation during the run."""

    every: int = field(default=0, validator=ge(0))
    """Steps between validations; 0 is never."""
    at_start: bool = False
    at_end: bool = False
    max_samples: int = field(default=256, validator=ge(1))
    num_generations_per_prompt: int = field(default=1, validator=ge(1))
    temperature: float = field(default=0.0, validator=ge(0))
    max_new_tokens: int | None = None
    """None is `generation.max_new_tokens`."""


@frozen(kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    enabled: bool = True
    every: int = field(default=0, validator=ge(0))
    """Steps between checkpoints; 0 saves only at the end and on an interrupt."""
    keep_last: int = field(default=2, validator=ge(1))
    keep_best: int = field(default=0, validator=ge(0))
    metric: str | None = None
    """Metric that ranks checkpoints for `keep_best`, such as `validation/accuracy`."""
    higher_is_better: bool = True
    resume: Literal["auto", "never", "must"] = "auto"
    """auto continues from the newest valid checkpoint of `run_dir` if there is one."""
    export_model: bool = True
    """Write the final policy as a Hugging Face checkpoint to `<run_dir>/model`."""


@frozen(kw_only=True)
class LoggingConfig:
    """What is shown and written."""

    loggers: tuple[ComponentChoice, ...] = field(default=(), metadata={"kind": "loggers"})
    progress: Literal["auto", "bar", "lines", "json", "none"] = "auto"
    num_samples_to_show: int = field(default=0, validator=ge(0))


@frozen(kw_only=True)
class InvariantsConfig:
    """Checks of a run; all on by default and cheap."""

    enabled: bool = True
    mismatch_warn: float = field(default=1.05, validator=gt(1))
    """Warn when mean exp|trainer logprob - engine logprob| exceeds this."""
    mismatch_abort: float | None = 2.0
    """Stop the run at this; None never."""
    zero_signal_steps: int = field(default=10, validator=ge(1))
    """Warn after this many steps in a row in which no group's rewards vary."""
    check_fingerprint: bool = True
    """Compare trainer and engine weights after each refit."""


@frozen(kw_only=True)
class ClusterConfig:
    """The machines."""

    launcher: Any = "local"
    """Launcher: name, `dist:name`, `module:attr` or class."""
    options: Any = field(factory=dict, metadata={"options_of": ("launchers", "launcher")})
    num_nodes: int = field(default=1, validator=ge(1))
    gpus_per_node: int | None = field(default=None, validator=optional(ge(0)))
    """None takes what is found; 0 is CPU only."""
    cpus_per_node: int | None = field(default=None, validator=optional(ge(1)))
    device: Literal["auto", "cpu", "cuda"] = "auto"
    colocated: bool = True
    """Training and generation share devices."""
    roles: dict[str, int] = Factory(dict)
    """Devices by role when not colocated, such as `{policy: 4, generation: 4}`."""

    @classmethod
    def auto_detect(cls) -> ClusterConfig:
        """This machine: its CUDA devices, or its CPU cores if it has none."""
        from nemo_rl_core.infra.resources import detect_devices

        device, gpus = detect_devices()
        return cls(device=device, gpus_per_node=gpus, cpus_per_node=os.cpu_count())


@frozen(kw_only=True)
class RunConfig:
    """What every run has, whatever the algorithm. An algorithm's root class extends it."""

    algorithm: Any = None
    """Name of the algorithm; it picks the root configuration class."""
    model: str | None = None
    """Shorthand for `policy.model_name`."""
    learning_rate: float | None = field(default=None, validator=optional(ge(0)))
    """Shorthand for `policy.optimizer.lr`."""
    max_steps: int | None = field(default=None, validator=optional(ge(1)))
    """Steps of the run loop; None is decided by `max_epochs`."""
    max_epochs: int | None = field(default=1, validator=optional(ge(1)))
    """Passes over the training data; the run ends at whichever of the two comes first."""
    seed: int = 42
    name: str | None = None
    """Name of the run; None is the algorithm's."""
    run_dir: str | None = None
    """Folder of checkpoints, metrics and rollouts; None is `runs/<name>`."""
    policy: PolicyConfig = Factory(PolicyConfig)
    generation: GenerationConfig = Factory(GenerationConfig)
    data: DataConfig = Factory(DataConfig)
    environment: ComponentChoice = component("environments")
    reward: ComponentChoice = component("rewards")
    rollouts: RolloutConfig = Factory(RolloutConfig)
    validation: ValidationConfig = Factory(ValidationConfig)
    checkpointing: CheckpointConfig = Factory(CheckpointConfig)
    logging: LoggingConfig = Factory(LoggingConfig)
    invariants: InvariantsConfig = Factory(InvariantsConfig)
    cluster: ClusterConfig = Factory(ClusterConfig)
    weight_sync: ComponentChoice = component("weight_syncs", "in_process")
    plugins: dict[str, str] = Factory(dict)
    """Bare name to qualified `dist:name` where two distributions provide one, as `{grpo: my-dist:grpo}`."""

    @property
    def num_items_per_step(self) -> int:
        """Prompts (or examples) consumed by one step; an algorithm's class overrides it."""
        raise NotImplementedError(f"{type(self).__name__} must define num_items_per_step")

    @property
    def group_size(self) -> int:
        """Rollouts per prompt; 1 for algorithms fed with examples."""
        return 1
