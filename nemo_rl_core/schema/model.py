"""Settings of a model and its training."""

from __future__ import annotations

from typing import Any, Literal

from attrs import Factory, field, frozen

from nemo_rl_core.schema.validators import ge, gt, le, optional

__all__ = ["OptimizerConfig", "PolicyConfig", "SchedulerConfig"]


@frozen(kw_only=True)
class OptimizerConfig:
    """The optimizer of the policy."""

    name: str = "torch.optim.AdamW"
    """Class of the optimizer: any `torch.optim` class, or another by import path."""
    lr: float = field(default=1e-6, validator=ge(0))
    """Peak learning rate, which `scheduler` scales."""
    weight_decay: float = field(default=0.01, validator=ge(0))
    """Decoupled weight decay per step, multiplied by the learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    eps: float = field(default=1e-8, validator=gt(0))
    """Constant that is added to the denominator of the update."""
    options: dict[str, Any] = Factory(dict)
    """Further keyword arguments of the class. `betas` and `eps` are passed only if the class takes them."""


@frozen(kw_only=True)
class SchedulerConfig:
    """Schedule of the learning rate over optimizer steps."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay after the warm-up."""
    warmup_steps: int = field(default=0, validator=ge(0))
    """Optimizer steps over which the learning rate rises linearly from 0."""
    total_steps: int | None = field(default=None, validator=optional(gt(0)))
    """Optimizer steps until the end of the decay. None follows from the run's `max_steps`."""
    min_lr_ratio: float = field(default=0.0, validator=[ge(0), le(1)])
    """Final learning rate as a fraction of `optimizer.lr`."""


@frozen(kw_only=True)
class PolicyConfig:
    """Model to train, and the backend that trains it."""

    model_name: str | None = None
    """Hub name, local folder, or `scratch:<name or folder>` for random weights of a shipped shape."""
    tokenizer_name: str | None = None
    """Hub name or folder of the tokenizer. None takes the model's own."""
    head: Literal["lm", "scalar"] = "lm"
    """Output of the model: lm for logits of the next token, scalar for one number per token (critic, reward model)."""
    backend: Any = None
    """Training backend: name, `dist:name`, `module:attr` or class. None takes the installed default."""
    options: Any = field(factory=dict, metadata={"options_of": ("training_backends", "backend"), "required": True})
    """Settings of the training backend, structured by its `config_class`."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations in the forward and backward pass."""
    num_workers: int = field(default=1, validator=ge(1))
    """Number of processes, one per device, that train the model."""
    tensor_parallel_size: int = field(default=1, validator=ge(1))
    """Number of workers that share each layer of one replica of the model. It must divide `num_workers`."""
    max_sequence_length: int = field(default=2048, validator=ge(2))
    """Maximum tokens of prompt and completions together. A rollout with a longer prompt fails and is recorded."""
    max_tokens_per_microbatch: int | None = field(default=None, validator=optional(ge(1)))
    """Token budget of one forward-backward pass. A longer sequence gets a pass of its own. None means 16384 on an
    accelerator and 2048 on a CPU, whose caches hold activations of about that many tokens."""
    activation_checkpointing: bool = False
    """Whether to recompute activations in the backward pass: less memory, about a third more time."""
    max_grad_norm: float | None = field(default=1.0, validator=optional(gt(0)))
    """Global L2 norm to which larger gradients are scaled down. None never scales."""
    logprob_chunk_size: int = field(default=1024, validator=ge(1))
    """Number of tokens whose [chunk, V] logits are in memory at a time."""
    optimizer: OptimizerConfig = Factory(OptimizerConfig)
    """Optimizer of the model."""
    scheduler: SchedulerConfig = Factory(SchedulerConfig)
    """Schedule of the learning rate over optimizer steps."""
    collective_timeout_s: float = field(default=600.0, validator=gt(0))
    """Seconds that workers may wait for each other in one collective operation."""
    trained: bool = True
    """Whether the model is trained, filled from its role. Do not set it. A frozen model holds no optimizer and no
    gradients."""

    def token_budget(self, device: str) -> int:
        """Return the tokens of one micro-batch on a type of device ("cpu", "cuda")."""
        return self.max_tokens_per_microbatch or (2048 if device == "cpu" else 16384)
