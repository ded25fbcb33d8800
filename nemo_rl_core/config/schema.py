"""The configuration tree: attrs classes, one place for each default.

`RunConfig` is what every run has; an algorithm's root class extends it. Names of components are chosen
here by name; their own options are structured by the class that the component names.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from attrs import Factory, field, frozen

from nemo_rl_core.config.validators import ge, gt, le, optional

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "ComponentChoice",
    "DataConfig",
    "DatasetConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "InvariantsConfig",
    "LoggingConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "RolloutConfig",
    "RolloutRunConfig",
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


def component(kind: str, default: str | None = None, **options: Any) -> Any:
    """An attrs field that chooses a component of `kind`, by default `default` with these options.

    Options that are configured without a name, or with this name, are laid over these.
    """
    return field(default=ComponentChoice(name=default, options=options), metadata={"kind": kind})


@frozen(kw_only=True)
class OptimizerConfig:
    """The optimizer of the policy."""

    name: str = "torch.optim.AdamW"
    """Any `torch.optim` class, or another by import path."""
    lr: float = field(default=1e-6, validator=ge(0))
    """Peak learning rate; `scheduler` scales it."""
    weight_decay: float = field(default=0.01, validator=ge(0))
    """Decoupled weight decay per step, times the learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: float = field(default=1e-8, validator=gt(0))
    """Added to the denominator of the update."""
    options: dict[str, Any] = Factory(dict)
    """Further keyword arguments; `betas` and `eps` are passed only if the class takes them."""


@frozen(kw_only=True)
class SchedulerConfig:
    """Learning rate over optimizer steps."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay after the warm-up."""
    warmup_steps: int = field(default=0, validator=ge(0))
    """Optimizer steps over which the rate rises from 0 in a line."""
    total_steps: int | None = field(default=None, validator=optional(gt(0)))
    """Optimizer steps to the end of the decay; None takes those of the run's `max_steps`."""
    min_lr_ratio: float = field(default=0.0, validator=[ge(0), le(1)])
    """Final learning rate as a share of `optimizer.lr`."""


@frozen(kw_only=True)
class PolicyConfig:
    """The model that is trained and the backend that trains it."""

    model_name: str | None = None
    """Hub name, local folder, or `scratch:<name or folder>` for random weights of a shipped shape."""
    tokenizer_name: str | None = None
    """None is the model's own."""
    head: Literal["lm", "scalar"] = "lm"
    """What the model gives: logits of the next token, or one number for each token (a critic, a reward model)."""
    backend: Any = None
    """Training backend: name, `dist:name`, `module:attr` or class; None is the installed default."""
    options: Any = field(factory=dict, metadata={"options_of": ("training_backends", "backend"), "required": True})
    """Settings of the training backend, structured by its `config_class`."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights and activations in the forward and backward pass."""
    num_workers: int = field(default=1, validator=ge(1))
    """Processes (one per device) that train the policy."""
    tensor_parallel_size: int = field(default=1, validator=ge(1))
    """Workers that share each layer of one replica of the model; divides `num_workers`."""
    max_sequence_length: int = field(default=2048, validator=ge(2))
    """Tokens of prompt and completions together; a longer prompt is a recorded failure."""
    max_tokens_per_microbatch: int | None = field(default=None, validator=optional(ge(1)))
    """Token budget of one forward-backward; a longer sequence goes alone. None is 16384 on an accelerator, and on a
    CPU 2048: activations of about that many stay in its caches."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    max_grad_norm: float | None = field(default=1.0, validator=optional(gt(0)))
    """The gradient is scaled down to this global L2 norm; None never."""
    logprob_chunk_size: int = field(default=1024, validator=ge(1))
    """Tokens whose [chunk, V] logits are held at a time."""
    optimizer: OptimizerConfig = Factory(OptimizerConfig)
    """The optimizer of the policy."""
    scheduler: SchedulerConfig = Factory(SchedulerConfig)
    """The learning rate over optimizer steps."""
    collective_timeout_s: float = field(default=600.0, validator=gt(0))
    """Deadline of one collective operation of the workers: how far apart they may come to it."""
    trained: bool = True
    """Filled from the model's role; do not set it. One that is not trained holds no optimizer and no gradients."""

    def token_budget(self, device: str) -> int:
        """Tokens of one micro-batch on a type of device ("cpu", "cuda")."""
        return self.max_tokens_per_microbatch or (2048 if device == "cpu" else 16384)


@frozen(kw_only=True)
class GenerationConfig:
    """The engine that samples, and how it samples."""

    model_name: str | None = None
    """Filled from the policy; do not set it."""
    backend: Any = None
    """Generation backend: name, `dist:name`, `module:attr` or class; None is the installed default."""
    options: Any = field(factory=dict, metadata={"options_of": ("generation_backends", "backend")})
    """Settings of the generation backend, structured by its `config_class`."""
    num_workers: int | None = field(default=None, validator=optional(ge(1)))
    """Engines in processes of their own, each with the whole model. None is one in the driver's process where the
    launcher allows it, or, with `cluster.colocated: false`, as many as `cluster.roles.generation` has room for."""
    max_restarts: int = field(default=3, validator=ge(0))
    """Times in a run that an engine process that died is started again; its rollouts are sampled anew."""
    heartbeat_timeout_s: float = field(default=60.0, validator=gt(0))
    """An engine process that answers nothing for so long hangs, or its machine is gone: it counts as dead."""
    refit_timeout_s: float = field(default=600.0, validator=gt(0))
    """Deadline of one weight sync: of bringing all engines to new weights."""
    call_timeout_s: float = field(default=600.0, validator=gt(0))
    """Deadline of any other call to an engine in a process of its own, but for completions, and of its coming back."""
    precision: Literal["float32", "bfloat16"] | None = None
    """None is the policy's."""
    max_new_tokens: int | None = field(default=None, validator=optional(ge(1)))
    """Tokens of one completion at most; None is 512, or half of `policy.max_sequence_length` if that is less."""
    temperature: float = field(default=1.0, validator=ge(0))
    """Divides the logits; 0 takes the most likely token. Training logprobs are taken at it too."""
    top_p: float = field(default=1.0, validator=[gt(0), le(1)])
    """Sample from the smallest set of tokens with at least this probability."""
    top_k: int = field(default=0, validator=ge(0))
    """Sample from the k most likely tokens; 0 is no limit."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion and stay in it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion, beside the model's own."""
    max_sequence_length: int | None = field(default=None, validator=optional(ge(2)))
    """Tokens of prompt and completion together; None is the policy's."""


@frozen(kw_only=True)
class DatasetConfig:
    """Where rows come from and how a row becomes a prompt."""

    source: Any = None
    """Dataset component (`huggingface`, `jsonl`, ...), a file or folder or hub name (the source is told from
    it), or rows in Python."""
    options: Any = field(factory=dict, metadata={"options_of": ("datasets", "source"), "open": True})
    """Settings of the dataset component, structured by its `config_class`."""
    columns: dict[str, str] = Factory(dict)
    """Our name to the column's name in the data, such as `{prompt: question, answer: solution}`."""
    prompt_template: str | None = None
    """Python format string over the row's columns, such as "Solve: {question}"."""
    system_prompt: str | None = None
    """Text of a system message put before each prompt; None is none."""
    limit: int | None = field(default=None, validator=optional(ge(1)))
    """Use only the first rows."""


@frozen(kw_only=True)
class DataConfig:
    """Training and validation data."""

    train: DatasetConfig = Factory(DatasetConfig)
    """Rows to train on."""
    validation: DatasetConfig | None = None
    """Rows to validate on; None is none."""
    shuffle: bool = True
    """Take the training rows in a new order each epoch, fixed by `seed`."""
    chat_template: str | None = None
    """A Jinja chat template, or the path of one; None is the tokenizer's. Without any, the contents of
    the messages are joined as they are."""
    chat_template_kwargs: dict[str, Any] = Factory(dict)
    """Further variables of the chat template."""


@frozen(kw_only=True)
class RolloutConfig:
    """How episodes are run."""

    max_turns: int = field(default=1, validator=ge(1))
    """Turns of the policy in one episode at most."""
    max_in_flight: int = field(default=1024, validator=ge(1))
    """Episodes admitted at a time."""
    staleness: int = field(default=0, validator=ge(0))
    """Steps of the run by which the weights that sampled may lie behind; 0 is synchronous on-policy training."""
    order: Literal["data", "ready_first"] = "data"
    """With staleness above 0: data trains on groups in the order of their prompts; ready_first on those that are done,
    the oldest first, so that a slow one holds up no step before its last."""
    too_old: Literal["wait", "resample", "drop"] = "wait"
    """With ready_first, what becomes of a group that the next step would find beyond the bound: wait for it now; or go
    on without it, and sample its prompt again with newer weights, or leave it out."""
    weight_updates: Literal["in_flight", "between"] | None = None
    """How new weights reach an engine that is sampling: in_flight swaps them under the requests, which go on; between
    lets the engine finish its requests first, and holds new ones back. None is in_flight where the engine can."""
    generation_timeout_s: float = field(default=600.0, validator=gt(0))
    """Deadline of one completion."""
    environment_timeout_s: float = field(default=120.0, validator=gt(0))
    """Deadline of one reset or step."""
    reward_timeout_s: float = field(default=30.0, validator=gt(0))
    """Deadline of one call in the process pool; the process is killed at it."""
    num_reward_workers: int = field(default=1, validator=ge(1))
    """Processes that run reward functions and CPU-bound scoring."""
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
    num_samples_to_show: int = field(default=0, validator=ge(0))
    """Rollouts printed after each step."""


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
    check_fingerprint: bool = True
    """Compare trainer and engine weights after each refit."""


@frozen(kw_only=True)
class ClusterConfig:
    """The machines."""

    launcher: Any = "local"
    """Launcher: name, `dist:name`, `module:attr` or class."""
    options: Any = field(factory=dict, metadata={"options_of": ("launchers", "launcher")})
    """Settings of the launcher, structured by its `config_class`."""
    num_nodes: int = field(default=1, validator=ge(1))
    """Machines of the cluster."""
    gpus_per_node: int | None = field(default=None, validator=optional(ge(0)))
    """None takes what is found; 0 is CPU only."""
    cpus_per_node: int | None = field(default=None, validator=optional(ge(1)))
    """CPU cores used on each machine; None takes what is found."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run: auto is cuda if there is a GPU."""
    colocated: bool = True
    """Training and generation share devices."""
    roles: dict[str, int] = Factory(dict)
    """Devices by role when not colocated, such as `{policy: 4, generation: 4}`."""
    offload: Literal["auto", "always", "never"] = "auto"
    """Colocated models and engines take turns: the weights and optimizers wait in the host's memory while the engine
    samples, and the engine sleeps while they train. auto does so on an accelerator; always on a CPU too. Needs
    `rollouts.staleness` 0."""

    @classmethod
    def auto_detect(cls) -> ClusterConfig:
        """This machine: its CUDA devices, or its CPU cores if it has none."""
        from nemo_rl_core.infra.resources import detect_devices

        device, gpus = detect_devices()
        return cls(device=device, gpus_per_node=gpus, cpus_per_node=os.cpu_count())

    def device_type(self) -> str:
        """`device`, or what "auto" is on this machine."""
        from nemo_rl_core.infra.resources import detect_devices

        return detect_devices()[0] if self.device == "auto" else self.device


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
