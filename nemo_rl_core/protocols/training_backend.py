"""Contract of a training backend: one rank of the model that is trained.

Legend: B sequences, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from attrs import field, frozen

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.loss import LossSums, ModelOutputs

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_rl_core.models.numerics.over_vocabulary import OutputLayer
    from nemo_rl_core.protocols.launcher import WorkerContext
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_core.schema import PolicyConfig
    from nemo_rl_core.schema.mistakes import Mistake

__all__ = ["LossFunction", "ModelMemory", "StepPlan", "StepResult", "TrainingBackend", "WeightInfo"]

LossFunction = Callable[[ModelOutputs, "BatchedDataDict"], LossSums]
"""A loss that the core has already divided by the global denominator: call `.total.backward()`.

It carries `needs`, the fields of `ModelOutputs` to fill.
"""


@frozen(kw_only=True)
class StepPlan:
    """How one optimizer step is cut up; made by the core for every rank."""

    micro_batches: Sequence[Sequence[int]]
    """Indices into the rank's batch, one list per micro-batch. Every rank has equally many; a list
    may be empty, and then the rank still takes part in the collectives of that micro-batch."""
    temperature: float = 1.0
    """Logits are divided by this before the log-softmax, as when the tokens were sampled."""
    gradient_scale: float = 1.0
    """Factor on each micro-batch loss before backward, for backends whose reduction averages over
    data-parallel ranks instead of summing (the core leaves it 1; such a backend multiplies by its
    own data-parallel size)."""
    update: bool = True
    """False: forward only, without gradient or optimizer step (evaluation of the loss)."""


@frozen(kw_only=True)
class StepResult:
    """What one rank reports of one optimizer step."""

    metrics: Mapping[str, Any] = field(factory=dict)
    """Name to `Metric` with plain floats: the loss's metrics summed over this rank's micro-batches,
    and `loss` (sum of the divided losses, reduction "sum")."""
    grad_norm: float = 0.0
    """Global L2 norm of the gradient before clipping, equal on every rank."""
    learning_rate: float = 0.0
    num_tokens: int = 0
    """Tokens this rank ran through the model."""


@frozen(kw_only=True)
class ModelMemory:
    """Bytes of one model on the device of one worker, of the worker that holds most."""

    weights: float
    """That compute, between steps."""
    gradients: float = 0.0
    optimizer: float = 0.0
    """Its state, and copies of the weights in a higher precision."""
    computing: float = 0.0
    """What a pass gathers of weights and keeps of gradients beside these."""
    activation_share: float = 1.0
    """Share of a micro-batch's activations that are on this device."""
    has_initial_weights: bool = False
    """See `TrainingBackend.has_initial_weights`: a reference that is the policy at its start takes nothing."""

    @property
    def held(self) -> float:
        """Between steps, with the gradients."""
        return self.weights + self.gradients + self.optimizer


@frozen(kw_only=True)
class WeightInfo:
    """Shape of one exported tensor, known before it is sent."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@runtime_checkable
class TrainingBackend(Protocol):
    """Trains one model. A component of group `nemo_rl.training_backends`.

    One object per rank, made without arguments by the launcher in its worker and then `setup`. All
    ranks of a role get the same calls in the same order. Sub-classing this protocol gives the defaults.

    Attributes:
        config_class: attrs class of `policy.options` for this backend.
        capabilities: Of "tensor_parallel", "pipeline_parallel", "context_parallel", "lora", "scalar_head"
            (serves `policy.head: scalar`), "top_logprobs", "over_vocabulary" (serves losses that need it, and gives
            `get_hidden_states` and `get_output_layer`), "exports_on_every_rank" (export_weights yields the tensors on
            all ranks), "share_weights" (export_weights yields live tensors that an engine in the same process may
            alias), "offload" (`offload` gives memory back). After `setup` an object may have fewer than its class.
    """

    config_class: ClassVar[type]
    capabilities: frozenset[str] = frozenset()

    @staticmethod
    def layout(policy: PolicyConfig) -> Mapping[str, int]:
        """The settings that multiply to the workers of one replica of the model: path within `policy` to size.

        Asked before any worker starts, of structured options. What `num_workers` has beyond one replica is data
        parallel.
        """
        return {"tensor_parallel_size": policy.tensor_parallel_size}

    @staticmethod
    def check(policy: PolicyConfig) -> Iterator[Mistake]:
        """What in `policy` does not fit its model, by path within it; the core checks workers against `layout`.

        Asked on the driver, before any worker starts. It may read the model's configuration, never its weights.

        Raises:
            ConfigError: The model's configuration cannot be read.
        """
        yield from ()

    @staticmethod
    def memory(policy: PolicyConfig, model: Any) -> ModelMemory:
        """What the workers of a model will hold, asked before any starts, to plan a run.

        Default: everything in `policy.precision` on every worker, divided by tensor parallelism alone.

        Args:
            policy: With structured options.
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
            config: The configuration of this model, the policy or another role; `config.options` is a `config_class`.
            context: Rank, world size, device, rendezvous address and seed of this worker.
        """
        ...

    def train_step(self, batch: BatchedDataDict, loss_fn: LossFunction, plan: StepPlan) -> StepResult:
        """Forward, backward and (if `plan.update`) one optimizer step.

        For each micro-batch: fill the `ModelOutputs` that `loss_fn.needs` names, call `loss_fn`, and
        backpropagate its `.total`. Never divide: that is done.

        Args:
            batch: This data-parallel rank's sequences (ranks of one model replica get the same).
            loss_fn: See `LossFunction`.
            plan: The micro-batches.
        """
        ...

    def get_logprobs(
        self, batch: BatchedDataDict, temperature: float = 1.0, micro_batches: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """[N] float32 logprobs of `batch["input_ids"]` under the current weights, on the CPU, no gradient.

        Computed in chunks: an [N, V] float32 matrix is never held. Logits are divided by `temperature`.
        """
        ...

    def get_values(self, batch: BatchedDataDict, micro_batches: Sequence[Sequence[int]] | None = None) -> Tensor:
        """[N] float32 output of the scalar head at each token, on the CPU, no gradient. Needs "scalar_head"."""
        raise ConfigError(f"{type(self).__name__} has no scalar head, which a critic or a reward model needs.")

    def get_top_logprobs(
        self,
        batch: BatchedDataDict,
        k: int,
        temperature: float = 1.0,
        micro_batches: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[N, k] int64 ids and float32 logprobs of the likeliest tokens, on the CPU. Needs "top_logprobs".

        Position i holds what the model would put in place of token i, likeliest first; zeros at each first token
        and outside `loss_mask`. Computed in chunks: an [N, V] float32 matrix is never held.
        """
        raise ConfigError(f"{type(self).__name__} cannot give the likeliest tokens, which distillation needs.")

    def get_hidden_states(self, batch: BatchedDataDict, micro_batches: Sequence[Sequence[int]] | None = None) -> Tensor:
        """[N, E] inputs of the output layer that predict each token, on the CPU. Needs "over_vocabulary".

        In the precision that computes; zeros at each first token and outside `loss_mask`.
        """
        raise ConfigError(f"{type(self).__name__} cannot give hidden states, which whole vocabularies are compared by.")

    def get_output_layer(self) -> OutputLayer:
        """The output layer in the precision that computes, on the CPU; of ranks but the first without rows.

        A collective. Needs "over_vocabulary".
        """
        raise ConfigError(f"{type(self).__name__} cannot give its output layer, which whole vocabularies need.")

    def has_initial_weights(self) -> bool:
        """Whether the weights of `setup` can be had beside the current ones without a second copy of the model.

        True where only adapters are trained. The run then takes its reference model from the policy's own workers.
        """
        return False

    def use_initial_weights(self, on: bool) -> None:
        """Compute what follows with the weights of `setup`, until called again with False.

        Only between steps: `get_logprobs`, `get_values`, `get_top_logprobs` and `get_hidden_states` are affected,
        nothing else is called.
        """
        raise ConfigError(f"{type(self).__name__} keeps no initial weights beside those it trains.")

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face parameter name, full tensor) of the current weights, tied ones once.

        A collective: every rank must exhaust it. Rank 0 gets the tensors; other ranks may get empty ones,
        unless the backend has the capability "exports_on_every_rank".
        """
        ...

    def apply(self, function: Callable[..., Any], /, *args: Any) -> Any:
        """`function(self, *args)`: how another component, such as a weight sync, works in this worker.

        The function is importable there, or travels by value.
        """
        return function(self, *args)

    def save_checkpoint(self, path: Path) -> None:
        """Write weights, optimizer, scheduler and this rank's RNG into the existing folder `path`.

        Loading it in a run of the same layout continues bit for bit.
        """
        ...

    def load_checkpoint(self, path: Path) -> None:
        """Restore what `save_checkpoint` wrote. Raises `CheckpointError` naming the file at fault."""
        ...

    def export_model(self, path: Path) -> None:
        """Write a Hugging Face checkpoint (config.json, safetensors) that `from_pretrained` loads."""
        ...

    def parallel_axes(self) -> Mapping[str, int]:
        """Names and sizes of the axes that the ranks stand on, the same on every rank; known after `setup`.

        Ranks are numbered row by row: the last axis varies fastest, and the sizes multiply to the number of workers.
        The batch is sharded over the axis "dp"; ranks that differ on other axes alone ("tp", "pp", "cp") get the same
        shard. The peers of the last axis, if that is "tp", share a machine.
        """
        return {"dp": 1}

    def offload(self) -> None:
        """Move weights, gradients and optimizer out of the accelerator's memory, for other processes to use.

        Called between steps, by all ranks; again it does nothing. Only `reload`, `parallel_axes` and `shutdown`
        are called before the model is back. Default: nothing.
        """
        return None

    def reload(self) -> None:
        """Undo `offload`, bit for bit; without one before it does nothing. Default: nothing."""
        return None

    def shutdown(self) -> None:
        """Release everything; may be called twice. Default: nothing."""
        return None
