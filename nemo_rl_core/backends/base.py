"""Work that training backends share: checks before a call, forward passes, steps that are not finite, host memory.

Legend: N tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypedDict, Unpack

import torch
from torch import Tensor

from nemo_rl_core.backends.host_memory import HostMemory
from nemo_rl_core.backends.per_token import fill_in_order
from nemo_rl_core.errors import ConfigError, InvariantViolation
from nemo_rl_core.protocols.training_backend import StepPlan, TrainingBackend

if TYPE_CHECKING:
    from nemo_rl_core.protocols.launcher import WorkerContext
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_core.schema import PolicyConfig

__all__ = ["OutputOptions", "TorchBackend"]


class OutputOptions(TypedDict, total=False):
    """Options of a forward pass."""

    needs: frozenset[str]
    """Fields of `ModelOutputs` to compute."""
    temperature: float
    """Divisor of the logits."""
    top_k: int
    """Number of likeliest tokens to give for each position."""


class TorchBackend(TrainingBackend):
    """Base of a training backend on PyTorch, which keeps the model, the step and the checkpoints to itself.

    A subclass calls `_begin` first in its `setup`, and sets `vocab_size` and `gives` there.
    """

    vocab_size: int
    """Ids that the output layer has."""
    gives: frozenset[str]
    """Outputs that can be had of the model, as losses name them."""

    def _begin(self, config: PolicyConfig, context: WorkerContext) -> None:
        """Take over configuration, device and role.

        Raises:
            ConfigError: No model is named.
        """
        if config.model_name is None:
            raise ConfigError("policy.model_name is not set. Give a hub name, a folder or scratch:<name>.")
        if context.num_threads is not None:
            torch.set_num_threads(context.num_threads)
        self.config = config
        self.device = torch.device(context.device)
        self.role = context.role
        self._host = HostMemory(constant=not config.trained)

    # -- checks -------------------------------------------------------------------------------

    def _check_step(self, plan: StepPlan, needs: frozenset[str]) -> None:
        """Refuse a step that this model cannot take.

        Raises:
            ConfigError: It is frozen, or lacks an output that the loss needs.
        """
        self._check_here()
        self._require(needs)
        if plan.update and not self.config.trained:
            raise ConfigError(f"The model of the role {self.role!r} is frozen: it has no optimizer and takes no steps.")

    def _require(self, needs: frozenset[str]) -> None:
        if unknown := needs - self.gives:
            raise ConfigError(
                f"The model of the role {self.role!r} does not give {', '.join(sorted(unknown))}: with "
                f"{self.role}.head={self.config.head!r} it gives {', '.join(sorted(self.gives))}."
            )

    def _check_here(self) -> None:
        self._host.check_here(f"The model of the role {self.role!r}")

    def _not_finite(self, loss: Tensor, gradient_norm: float) -> InvariantViolation:
        """Make the error for a step whose `loss` [] or gradient is not finite; the gradient has been dropped."""
        return InvariantViolation(
            f"The training step is not finite (loss {float(loss)}, gradient norm {gradient_norm}); the weights were "
            "not changed. Usual causes: a learning rate that is too high, a reward or advantage that is not finite, a "
            f"logprob of -inf among the trained tokens, or overflow ({self.role}.precision={self.config.precision!r})."
        )

    # -- forward only -------------------------------------------------------------------------

    def get_logprobs(
        self, batch: BatchedDataDict, temperature: float = 1.0, micro_batches: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """[N] float32 logprobs of `batch["input_ids"]`, on the CPU, without gradient.

        If the batch has a `loss_mask`, only the tokens it selects are computed; the others are 0, as is the first
        token of each sequence.
        """
        needs = frozenset({"logprobs"})
        self._require(needs)
        return self._outputs(batch, micro_batches, needs, temperature=temperature, needs=needs)["logprobs"]

    def get_values(self, batch: BatchedDataDict, micro_batches: Sequence[Sequence[int]] | None = None) -> Tensor:
        """[N] float32 output of the scalar head at each token, on the CPU, without gradient."""
        needs = frozenset({"values"})
        self._require(needs)
        return self._outputs(batch, micro_batches, needs, needs=needs)["values"]

    def get_top_logprobs(
        self,
        batch: BatchedDataDict,
        k: int,
        temperature: float = 1.0,
        micro_batches: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[N, k] ids and float32 logprobs of the likeliest tokens in place of each trained one, on the CPU."""
        self._require(frozenset({"logprobs"}))
        k = min(k, self.vocab_size)
        names = ("top_ids", "top_logprobs")
        out = self._outputs(batch, micro_batches, names, temperature=temperature, needs=frozenset(), top_k=k)
        return out["top_ids"], out["top_logprobs"]

    def _outputs(
        self,
        batch: BatchedDataDict,
        micro_batches: Sequence[Sequence[int]] | None,
        names: Iterable[str],
        **options: Unpack[OutputOptions],
    ) -> dict[str, Tensor]:
        """Compute outputs for each token of the batch, [N, ...] each, on the CPU.

        If `micro_batches` is None, each holds as many sequences as fit.
        """
        self._check_here()
        if micro_batches is None:
            micro_batches = fill_in_order(batch.lengths, self.config.token_budget(self.device.type))
        with torch.no_grad():
            return self._forward_only(batch, micro_batches or [[]], names, **options)

    @abstractmethod
    def _forward_only(
        self,
        batch: BatchedDataDict,
        micro_batches: Sequence[Sequence[int]],
        names: Iterable[str],
        **options: Unpack[OutputOptions],
    ) -> dict[str, Tensor]:
        """Compute the outputs `names` of the model, [N, ...] each."""
        ...

    # -- place --------------------------------------------------------------------------------

    def reload(self) -> None:
        """Undo `offload`."""
        self._host.reload()
