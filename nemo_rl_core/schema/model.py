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
