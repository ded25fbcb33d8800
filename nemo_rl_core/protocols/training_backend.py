"""Contract of a training backend: trains one rank's part of a model.

Legend: B sequences, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar, TypeVarTuple, Unpack, runtime_checkable

from attrs import field, frozen

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.loss import LossSums, ModelOutputs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from nemo_rl_core.models.numerics.over_vocabulary import OutputLayer
    from nemo_rl_core.protocols.launcher import WorkerContext
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_core.schema import PolicyConfig
    from nemo_rl_core.schema.mistakes import Mistake

__all__ = ["LossFunction", "ModelMemory", "StepPlan", "StepResult", "TrainingBackend", "WeightInfo"]

_R = TypeVar("_R")
_Ts = TypeVarTuple("_Ts")

LossFunction = Callable[[ModelOutputs, "BatchedDataDict"], LossSums]
"""A loss that the core divides by the global denominator: call `.total.backward()` on its result.

Its attribute `needs` has the fields of `ModelOutputs` to fill.
"""


@frozen(kw_only=True)
class StepPlan:
    """Division of one optimizer step into micro-batches; the core makes one for every rank."""

    micro_batches: Sequence[Sequence[int]]
    """Indices into the rank's batch, one list per micro-batch. Every rank has the same number of lists. A rank with
    an empty list still takes part in the collectives of that micro-batch."""
    temperature: float = 1.0
    """Divisor of the logits before the log-softmax, as when the tokens were sampled."""
    gradient_scale: float = 1.0
    """Factor on each micro-batch loss before backward, for backends whose reduction averages over
    data-parallel ranks instead of summing. The core leaves it 1; such a backend multiplies by its
    own data-parallel size."""
    update: bool = True
    """Whether to compute gradients and take an optimizer step; False only evaluates the loss."""


@frozen(kw_only=True)
class StepResult:
    """Report of one rank on one optimizer step."""

    metrics: Mapping[str, Any] = field(factory=dict)
    """`Metric` by name, with plain floats: the loss's metrics summed over this rank's micro-batches,
    and `loss` (sum of the divided losses, reduction "sum")."""
    grad_norm: float = 0.0
    """Global L2 norm of the gradient before clipping, equal on every rank."""
    learning_rate: float = 0.0
    num_tokens: int = 0
    """Number of tokens that this rank ran through the model."""


@frozen(kw_only=True)
class ModelMemory:
    """Memory in bytes of one model on one device, for the worker that holds most."""

    weights: float
    """Weights used in the forward pass, as held between steps."""
    gradients: float = 0.0
    optimizer: float = 0.0
    """State of the optimizer, and copies of the weights in a higher precision."""
    computing: float = 0.0
    """Further weights and gradients that exist only during a pass."""
    activation_share: float = 1.0
    """Share of a micro-batch's activations that are on this device."""
    has_initial_weights: bool = False
    """Whether a reference model with the policy's initial weights takes no memory of its own, see
    `TrainingBackend.has_initial_weights`."""

    @property
    def held(self) -> float:
        """Memory held between steps, including gradients."""
        return self.weights + self.gradients + self.optimizer


@frozen(kw_only=True)
class WeightInfo:
    """Name, shape and type of one exported tensor, known before it is sent."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@runtime_checkable
class TrainingBackend(Protocol):
    """Trains one model. A component of group `nemo_rl.training_backends`.

    There is one object per rank. The launcher creates it in its worker without arguments and then calls `setup`. All
    ranks of a role get the same calls in the same order. Subclass this protocol to inherit the defaults.

    Attributes:
        config_class: attrs class of `policy.options` for this backend. Where a model is split in more ways
            than by tensor parallelism, it has a method `layout` (see `nemo_rl_core.config.layouts.HasLayout`).
        capabilities: Any of "tensor_parallel", "pipeline_parallel", "context_parallel", "lora", "scalar_head"
            (supports `policy.head: scalar`), "top_logprobs", "over_vocabulary" (supports losses that need it, and
            implements `get_hidden_states` and `get_output_layer`), "exports_on_every_rank" (export_weights yields the
            tensors on all ranks), "share_weights" (export_weights yields live tensors that an engine in the same
            process may alias), "offload" (`offload` releases memory). After `setup` an object may have fewer than its
            class.
    """

    config_class: ClassVar[type]
    capabilities: frozenset[str] = frozenset()

    @staticmethod
    def check(policy: PolicyConfig) -> Iterator[Mistake]:
        """Yield the settings in `policy` that do not fit the model, by path within `policy`.

        Called on the driver before any worker starts. It may read the model's configuration, never its weights. The
        core itself checks the number of workers against the layout.

        Raises:
            ConfigError: The model's configuration cannot be read.
        """
        yield from ()

    @staticmethod
    def memory(policy: PolicyConfig, model: PreTrainedModel) -> ModelMemory:
        """Estimate the memory of the model's workers, to plan a run before any worker starts.

        Default: everything in `policy.precision` on every worker, divided by tensor parallelism only.

        Args:
            policy: Settings of the model, with structured options.
            model: The `transformers` model on the meta device: shapes without weights.
        """
        count = sum(p.numel() for p in model.parameters()) / policy.tensor_parallel_size
        size = count * (2 if policy.precision == "bfloat16" else 4)
        return (
            ModelMemory(weights=size, gradients=size, optimizer=2 * size)
            if policy.trained
            else ModelMemory(weights=size)
        )

    def setup(self, config: PolicyConfig, context: WorkerContext) -> None:
        """Build or load the model and, if `config.trained`, the optimizer on this rank.

        Args:
            config: Settings of this model, the policy or another role; `config.options` is a `config_class`.
            context: Rank, world size, device, rendezvous address and seed of this worker.
        """
        ...

    def train_step(self, batch: BatchedDataDict, loss_fn: LossFunction, plan: StepPlan) -> StepResult:
        """Run forward, backward and (if `plan.update`) one optimizer step.

        For each micro-batch: fill the `ModelOutputs` that `loss_fn.needs` names, call `loss_fn`, and
        backpropagate its `.total`. Never divide: the core has done that.

        Args:
            batch: Sequences of this data-parallel rank; all ranks of one model replica get the same.
            loss_fn: Loss to call, see `LossFunction`.
            plan: Micro-batches of the step.
        """
        ...

    def get_logprobs(
        self, batch: BatchedDataDict, temperature: float = 1.0, micro_batches: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """[N] float32 logprobs of `batch["input_ids"]` under the current weights, on the CPU, without gradient.

        Logits are divided by `temperature`. Compute in chunks: never hold an [N, V] float32 matrix.
        """
        ...

    def get_values(self, batch: BatchedDataDict, micro_batches: Sequence[Sequence[int]] | None = None) -> Tensor:
        """[N] float32 output of the scalar head at each token, on the CPU, without gradient. Needs "scalar_head"."""
        raise ConfigError(f"{type(self).__name__} has no scalar head, which a critic or a reward model needs.")

    def get_top_logprobs(
        self,
        batch: BatchedDataDict,
        k: int,
        temperature: float = 1.0,
        micro_batches: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[N, k] int64 ids and float32 logprobs of the likeliest tokens, on the CPU. Needs "top_logprobs".

        Position i holds the model's likeliest tokens in place of token i, likeliest first; zeros at each first token
        and outside `loss_mask`. Compute in chunks: never hold an [N, V] float32 matrix.
        """
        raise ConfigError(f"{type(self).__name__} cannot give the likeliest tokens, which distillation needs.")

    def get_hidden_states(self, batch: BatchedDataDict, micro_batches: Sequence[Sequence[int]] | None = None) -> Tensor:
        """[N, E] inputs of the output layer that predict each token, on the CPU. Needs "over_vocabulary".

        They have the precision of the forward pass, and are zero at each first token and outside `loss_mask`.
        """
        raise ConfigError(f"{type(self).__name__} cannot give hidden states, which whole vocabularies are compared by.")

    def get_output_layer(self) -> OutputLayer:
        """Return the output layer in the precision of the forward pass, on the CPU. Needs "over_vocabulary".

        A collective. Only the first rank's layer has rows.
        """
        raise ConfigError(f"{type(self).__name__} cannot give its output layer, which whole vocabularies need.")

    def has_initial_weights(self) -> bool:
        """Return whether the initial weights remain available without a second copy of the model.

        True if only adapters are trained. The policy's own workers then serve as the reference model.
        """
        return False

    def use_initial_weights(self, on: bool) -> None:
        """Compute with the initial weights (True), or again with the current ones (False).

        Called between steps only. While it is on, the core calls nothing but `get_logprobs`, `get_values`,
        `get_top_logprobs` and `get_hidden_states`.
        """
        raise ConfigError(f"{type(self).__name__} keeps no initial weights beside those it trains.")

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face parameter name, full tensor [...]) for the current weights, tied ones once.

        A collective: every rank must exhaust it. Rank 0 yields the tensors; other ranks may yield empty ones,
        unless the backend has the capability "exports_on_every_rank".
        """
        ...

    def apply(self, function: Callable[[Self, Unpack[_Ts]], _R], /, *args: *_Ts) -> _R:
        """Return `function(self, *args)`, so that another component, such as a weight sync, can work in this worker.

        The function is importable in the worker, or is sent by value.
        """
        return function(self, *args)

    def save_checkpoint(self, path: Path) -> None:
        """Write weights, optimizer, scheduler and this rank's RNG state into the existing folder `path`.

        A run of the same layout that loads it continues bit for bit.
        """
        ...

    def load_checkpoint(self, path: Path) -> None:
        """Restore what `save_checkpoint` wrote.

        Raises:
            CheckpointError: A file is missing or damaged; the message names it.
        """
        ...

    def export_model(self, path: Path) -> None:
        """Write a Hugging Face checkpoint (config.json, safetensors) that `from_pretrained` loads."""
        ...

    def parallel_axes(self) -> Mapping[str, int]:
        """Return names and sizes of the axes over which the ranks are arranged; known after `setup`.

        Every rank returns the same. Ranks are numbered row by row: the last axis varies fastest, and the product of the
        sizes is the number of workers. The batch is sharded over the axis "dp"; ranks that differ only on other axes
        ("tp", "pp", "cp") get the same shard. If the last axis is "tp", its peers share a machine.
        """
        return {"dp": 1}

    def offload(self) -> None:
        """Move weights, gradients and optimizer out of the accelerator's memory, for other processes to use.

        Called on all ranks, between steps; a second call is a no-op. Until `reload`, the core calls nothing but
        `parallel_axes` and `shutdown`. Default: no-op.
        """
        return None

    def reload(self) -> None:
        """Undo `offload`, bit for bit; no-op if the model is in place. Default: no-op."""
        return None

    def shutdown(self) -> None:
        """Release everything; may be called twice. Default: no-op."""
        return None
