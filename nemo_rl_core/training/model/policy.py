"""The driver's view of a training backend: one global batch in, one optimizer step, metrics out.

The ranks get shards balanced by tokens, each with equally many micro-batches under the token budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple, Unpack

import torch
from attrs import evolve, frozen

from nemo_rl_core.errors import InvariantViolation, PluginIncompatible
from nemo_rl_core.protocols.launcher import on_shards, on_workers
from nemo_rl_core.protocols.training_backend import StepPlan, TrainingBackend
from nemo_rl_core.records.shared_value import SharedValue, hold
from nemo_rl_core.training.model.metrics import merge_metrics, metric_values
from nemo_rl_core.training.model.normalize import NormalizedLoss, count_trained
from nemo_rl_core.training.model.sharding import plan_step

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_rl_core.models.numerics.over_vocabulary import OutputLayer
    from nemo_rl_core.protocols.launcher import WorkerGroup
    from nemo_rl_core.protocols.loss import Loss
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_core.records.shared_value import Movable

__all__ = ["InitialModel", "Policy"]

_R = TypeVar("_R")
_Ts = TypeVarTuple("_Ts")


@frozen
class _Shard:
    indices: Sequence[int]
    micro_batches: Sequence[Sequence[int]]


class Policy:
    """A model on the workers of one role.

    Args:
        group: Its workers, already set up.
        token_budget: Tokens of one micro-batch (`policy.max_tokens_per_microbatch`).
        temperature: The sampling temperature; logprobs are taken at it.
        can_offload: Whether its backend can leave the device's memory.
    """

    def __init__(
        self, group: WorkerGroup, *, token_budget: int, temperature: float = 1.0, can_offload: bool = False
    ) -> None:
        self.group = group
        self.can_offload = can_offload
        self.before_use: Callable[..., None] = _nothing
        """Called before the model is used, with `stepping` before an optimizer step and `saving` before it is written;
        `DeviceTurns` brings it back to its device."""
        self.token_budget = token_budget
        self.temperature = temperature if temperature > 0 else 1.0
        self.axes: dict[str, int] = dict(on_workers(group, TrainingBackend.parallel_axes)()[0])
        if math.prod(self.axes.values()) != group.size:
            raise PluginIncompatible(
                f"parallel_axes() of the training backend gives {self.axes} for {group.size} worker(s): the sizes must "
                "multiply to the number of workers. Tell the backend's author."
            )
        self.num_shards = self.axes.get("dp", 1)

    def train_step(self, batch: BatchedDataDict, loss: Loss, *, update: bool = True) -> dict[str, float]:
        """Take one optimizer step on the whole of `batch` (or, without `update`, only the loss and metrics).

        Returns:
            Metrics by name, `grad_norm` and `lr` with them when the weights were updated.

        Raises:
            InvariantViolation: The loss or the gradient norm is not finite.
        """
        self.before_use(stepping=update)
        normalized = NormalizedLoss(loss, count_trained(batch))
        arguments = [
            (
                self._take(batch, shard),
                normalized,
                StepPlan(micro_batches=shard.micro_batches, temperature=self.temperature, update=update),
            )
            for shard in self._plan(batch, whole_groups=getattr(loss, "unit", "sequence") == "group")
        ]
        results = self._on_shards(TrainingBackend.train_step)(arguments)
        metrics = metric_values(merge_metrics(result.metrics for result in results))
        if update:
            metrics["grad_norm"] = results[0].grad_norm
            metrics["lr"] = results[0].learning_rate
        for name in ("loss", "grad_norm"):
            if name in metrics and not torch.isfinite(torch.tensor(metrics[name])):
                raise InvariantViolation(
                    f"{name} is {metrics[name]} in this step. Look for a diverging learning rate, a reward that is "
                    "not finite, or bfloat16 overflow; the last checkpoint holds finite weights."
                )
        return metrics

    def logprobs(self, batch: BatchedDataDict) -> Tensor:
        """[N] float32 logprobs of the batch's tokens under the current weights."""
        (logprobs,) = self._forward(TrainingBackend.get_logprobs, batch, self.temperature)
        return logprobs

    def values(self, batch: BatchedDataDict) -> Tensor:
        """[N] float32 output of the model's scalar head at each token."""
        (values,) = self._forward(TrainingBackend.get_values, batch)
        return values

    def top_logprobs(self, batch: BatchedDataDict, k: int) -> tuple[Tensor, Tensor]:
        """[N, k] ids and float32 logprobs of the k likeliest tokens in place of each token."""
        ids, logprobs = self._forward(TrainingBackend.get_top_logprobs, batch, k, self.temperature)
        return ids, logprobs

    def hidden_states(self, batch: BatchedDataDict) -> Tensor:
        """[N, E] inputs of the output layer that predict each token."""
        (hidden,) = self._forward(TrainingBackend.get_hidden_states, batch)
        return hidden

    def output_layer(self) -> OutputLayer:
        """Return the output layer, at the sampling temperature, on the CPU."""
        self.before_use()
        layer = on_workers(self.group, TrainingBackend.get_output_layer)()[0]
        return evolve(layer, transform=evolve(layer.transform, temperature=self.temperature))

    def keep(self, value: Movable) -> SharedValue:
        """Send a large value to every worker once; a worker in this process shares it."""
        shared = SharedValue(value)
        if self.group.local is None:
            self.group.call("apply", hold, shared.key, value)
        return shared

    @property
    def has_initial_weights(self) -> bool:
        """Whether these workers can still compute with the initial weights, see `InitialModel`."""
        return all(on_workers(self.group, TrainingBackend.has_initial_weights)())

    def save(self, path: Path) -> None:
        """Write the backend's checkpoint into the new folder `path`."""
        self.before_use(saving=True)
        path.mkdir(parents=True, exist_ok=True)
        path = path.absolute()  # workers may have another working directory
        on_workers(self.group, TrainingBackend.save_checkpoint)(path)

    def load(self, path: Path) -> None:
        """Restore the backend's checkpoint."""
        self.before_use()
        on_workers(self.group, TrainingBackend.load_checkpoint)(path.absolute())

    def export_model(self, path: Path) -> None:
        """Write a Hugging Face checkpoint."""
        self.before_use(saving=True)
        on_workers(self.group, TrainingBackend.export_model)(path.absolute())

    def check_alive(self) -> None:
        """Raise `WorkerDied` if one of its workers has died while nobody called it; returns at once."""
        self.group.check_alive()

    def offload(self) -> None:
        """Move the model out of the memory of its devices."""
        on_workers(self.group, TrainingBackend.offload)()

    def reload(self) -> None:
        """Undo `offload`."""
        on_workers(self.group, TrainingBackend.reload)()

    def shutdown(self) -> None:
        """End the workers."""
        self.group.shutdown()

    # -- sharding -------------------------------------------------------------------------------

    def _forward(
        self,
        method: Callable[
            [TrainingBackend, BatchedDataDict, Unpack[_Ts], Sequence[Sequence[int]]], Tensor | tuple[Tensor, ...]
        ],
        batch: BatchedDataDict,
        *options: *_Ts,
    ) -> tuple[Tensor, ...]:
        """Call a method of the backend on every shard; return its tensors [N, ...] in the order of the batch."""
        self.before_use()
        shards = self._plan(batch)
        arguments = [(self._take(batch, shard), *options, shard.micro_batches) for shard in shards]
        results = self._on_shards(method)(arguments)
        parts = [result if isinstance(result, tuple) else (result,) for result in results]
        order = [i for shard in shards for i in shard.indices]
        return tuple(
            _restore(torch.cat([part.to("cpu") for part in column]), order, batch)
            for column in zip(*parts, strict=True)
        )

    def _plan(self, batch: BatchedDataDict, *, whole_groups: bool = False) -> list[_Shard]:
        plans = plan_step(
            batch.lengths,
            num_shards=self.num_shards,
            token_budget=self.token_budget,
            group_ids=batch["group_ids"] if whole_groups else None,
        )
        return [_Shard(plan.indices, plan.micro_batches) for plan in plans]

    def _take(self, batch: BatchedDataDict, shard: _Shard) -> BatchedDataDict:
        return batch.select(shard.indices)

    def _on_shards(
        self, method: Callable[[TrainingBackend, Unpack[_Ts]], _R]
    ) -> Callable[[Sequence[tuple[*_Ts]]], list[_R]]:
        """Return a function that calls a method of the backend with the arguments of each shard: one result each."""
        over = ["dp"] if "dp" in self.axes else []
        return on_shards(self.group, method, axes=self.axes, over=over)


class InitialModel:
    """A policy as it was before the run, computed by the policy's own workers (adapters are switched off).

    Args:
        policy: One that has its initial weights.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def logprobs(self, batch: BatchedDataDict) -> Tensor:
        """[N] float32 logprobs of the batch's tokens under the initial weights."""
        with self._initial() as model:
            return model.logprobs(batch)

    def values(self, batch: BatchedDataDict) -> Tensor:
        """[N] float32 output of the initial model's scalar head at each token."""
        with self._initial() as model:
            return model.values(batch)

    def top_logprobs(self, batch: BatchedDataDict, k: int) -> tuple[Tensor, Tensor]:
        """[N, k] ids and float32 logprobs of the k likeliest tokens under the initial weights."""
        with self._initial() as model:
            return model.top_logprobs(batch, k)

    def hidden_states(self, batch: BatchedDataDict) -> Tensor:
        """[N, E] inputs of the output layer that predict each token, under the initial weights."""
        with self._initial() as model:
            return model.hidden_states(batch)

    def output_layer(self) -> OutputLayer:
        """Return the output layer, which no adapter changes."""
        return self._policy.output_layer()

    def keep(self, value: Movable) -> SharedValue:
        """Send a large value to the policy's workers once."""
        return self._policy.keep(value)

    @contextmanager
    def _initial(self) -> Iterator[Policy]:
        self._policy.before_use()
        use_initial_weights = on_workers(self._policy.group, TrainingBackend.use_initial_weights)
        use_initial_weights(True)
        try:
            yield self._policy
        finally:
            use_initial_weights(False)


def _nothing(*, stepping: bool = False, saving: bool = False) -> None:
    """Do nothing: the model is always in place."""


def _restore(joined: Tensor, order: Sequence[int], batch: BatchedDataDict) -> Tensor:
    """Put per-token values [N, ...], joined in the order of the sequences in `order`, back into the batch's order."""
    out = torch.empty(batch.num_tokens, *joined.shape[1:], dtype=joined.dtype)
    offsets = batch.offsets
    lengths = batch.lengths
    index = torch.as_tensor(order, dtype=torch.int64)
    new_lengths = lengths[index]
    starts = new_lengths.cumsum(0) - new_lengths
    target = torch.arange(batch.num_tokens) + (offsets[:-1][index] - starts).repeat_interleave(new_lengths)
    out[target] = joined
    return out
