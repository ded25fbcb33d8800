"""`MegatronBackend`: trains Hugging Face causal language models with megatron-core.

Legend: B sequences, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from attrs import evolve, frozen
from torch import Tensor

from nemo_rl_core.backends import sealed_file
from nemo_rl_core.backends.base import TorchBackend
from nemo_rl_core.backends.per_token import PerToken, one_token
from nemo_rl_core.backends.step_metrics import StepMetrics
from nemo_rl_core.config.components import finished_options
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models import is_scratch, load_model, load_model_config, write_model
from nemo_rl_core.models.numerics.vocabulary_head import check_ids
from nemo_rl_core.protocols.loss import ModelOutputs
from nemo_rl_core.protocols.training_backend import LossFunction, ModelMemory, StepPlan, StepResult
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.schema import Mistake, mistake
from nemo_rl_plugins_megatron import checkpoint
from nemo_rl_plugins_megatron._megatron import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    check_version,
    finalize_model_grads,
    get_forward_backward_func,
)
from nemo_rl_plugins_megatron.config import MegatronConfig
from nemo_rl_plugins_megatron.cpu import seed_rng_tracker, without_gpu
from nemo_rl_plugins_megatron.families import family_of
from nemo_rl_plugins_megatron.memory import model_memory
from nemo_rl_plugins_megatron.model import build_model, check_rope, freeze_embedding_of
from nemo_rl_plugins_megatron.optimizer import Optimizer
from nemo_rl_plugins_megatron.outputs import TokenOutputs
from nemo_rl_plugins_megatron.parallel import Ranks
from nemo_rl_plugins_megatron.pretrained import open_weights
from nemo_rl_plugins_megatron.rows import Row
from nemo_rl_plugins_megatron.sizes import check_sizes, size_mistakes
from nemo_rl_plugins_megatron.weights import WeightMap

if TYPE_CHECKING:
    from torch import nn

    from nemo_rl_core.protocols.launcher import WorkerContext
    from nemo_rl_core.schema import PolicyConfig

__all__ = ["MegatronBackend"]

_FORMAT = 2


@frozen
class _MicroBatch:
    indices: Sequence[int]
    batch: BatchedDataDict
    row: Row


class MegatronBackend(TorchBackend):
    """Training with tensor, pipeline, context, sequence, expert and data parallelism by megatron-core."""

    config_class: ClassVar[type] = MegatronConfig
    capabilities: frozenset[str] = frozenset(
        {
            "tensor_parallel",
            "pipeline_parallel",
            "context_parallel",
            "exports_on_every_rank",
            "scalar_head",
            "top_logprobs",
            "offload",
        }
    )

    @staticmethod
    def check(policy: PolicyConfig) -> Iterator[Mistake]:
        """A model that these layers do not do, and sizes that do not fit it or the workers."""
        hf_config = load_model_config(str(policy.model_name))
        try:
            family_of(hf_config)
            check_rope(hf_config)
        except ConfigError as error:
            yield mistake("model_name", str(error), "Set backend: dtensor, or take another model.", related=["backend"])
            return
        yield from size_mistakes(hf_config, policy)

    @staticmethod
    def memory(policy: PolicyConfig, model: object) -> ModelMemory:
        """Weights and float32 gradients lie on every data-parallel worker, the optimizer is shared out."""
        return model_memory(policy, model)

    def setup(self, config: PolicyConfig, context: WorkerContext) -> None:
        """Build this rank's part of the model, load its weights and make the optimizer.

        Raises:
            ConfigError: The model, the optimizer or the layout is not available.
        """
        check_version()
        self._begin(config, context)
        assert config.model_name is not None
        self.options: MegatronConfig = finished_options(type(self), config.options)
        self.hf_config = load_model_config(config.model_name)
        family_of(self.hf_config)
        check_rope(self.hf_config)
        given = evolve(config, options=self.options, num_workers=context.world_size)
        check_sizes(self.hf_config, given, role=context.role)
        self.ranks = Ranks(config, self.options, context, self.device)
        self._closed = False
        try:
            with without_gpu(self.device):
                self._build(context.seed)
        except BaseException:
            self.shutdown()
            raise

    def _build(self, seed: int) -> None:
        config, ranks = self.config, self.ranks
        seed_rng_tracker(self.device, seed)
        self.model = build_model(self.hf_config, config, self.options, ranks)
        self.dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        # Random weights are drawn in float32, so that a policy and its reference start as one.
        exact = config.trained or is_scratch(str(config.model_name))
        source = open_weights(config, self.hf_config, dtype=torch.float32 if exact else self.dtype, seed=seed)
        self.weights = WeightMap(self.hf_config, source.shapes, self.model, ranks)
        self.weights.load(source)
        freeze_embedding_of(self.model, getattr(self.hf_config, "pad_token_id", None), ranks)
        self.outputs = TokenOutputs(
            self.model,
            ranks,
            vocab_size=self.hf_config.vocab_size,
            chunk_size=config.logprob_chunk_size,
            is_scalar=config.head == "scalar",
        )
        self.gives, self.vocab_size = self.outputs.gives, self.hf_config.vocab_size
        self.model.train()
        self.chunk: Any = self.model
        self.optimizer: Optimizer | None = None
        if not config.trained:
            self.model.requires_grad_(False)
            return
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=self.options.distributed_optimizer
        )
        self.chunk = DistributedDataParallel(self.model.config, ddp, self.model)
        self.model.config.finalize_model_grads_func = _sum_gradients
        self.optimizer = Optimizer(config, self.chunk, distributed=self.options.distributed_optimizer)
        if self.weights.rounded:
            self.weights.load_masters(source, self.optimizer.shares())

    # -- training -----------------------------------------------------------------------------

    def train_step(self, batch: BatchedDataDict, loss_fn: LossFunction, plan: StepPlan) -> StepResult:
        """Forward, backward and one optimizer step; without `plan.update` the forward pass only.

        The entropy carries gradient if `loss_fn.needs` asks for it.

        Raises:
            ConfigError: The loss needs an output that this backend does not have.
            InvariantViolation: The loss or the gradient is not finite; the weights are as before the call.
        """
        needs = frozenset(getattr(loss_fn, "needs", frozenset({"logprobs"})))
        self._check_step(plan, needs)
        metrics = StepMetrics()
        losses = [torch.zeros((), device=self.device)]

        def step(micro: _MicroBatch, hidden: Tensor) -> Tensor:
            """Return the loss [] of a micro-batch from its last hidden states [T, 1, E]."""
            asked = needs if micro.indices else frozenset()
            out = self.outputs(hidden, micro.row, temperature=plan.temperature, needs=asked)
            if not micro.indices:
                return out["anchor"]
            outputs = ModelOutputs(**{name: out[name] for name in needs})
            sums = loss_fn(outputs, micro.batch.to(self.device, non_blocking=True))
            metrics.add(sums.metrics)
            losses.append(sums.total.detach())
            total = sums.total if sums.total.requires_grad else sums.total + out["anchor"]
            return total * plan.gradient_scale

        rows = self._micro_batches(batch, plan.micro_batches, only_trained=True, with_top_ids="top_logprobs" in needs)
        with without_gpu(self.device), torch.set_grad_enabled(plan.update):
            if plan.update:
                self._forget_gradient()
            self._run(rows, len(plan.micro_batches), step, update=plan.update)
            learning_rate = self.optimizer.learning_rate if plan.update and self.optimizer is not None else 0.0
            grad_norm = self._update(torch.stack(losses).sum()) if plan.update else 0.0
        return StepResult(
            metrics=self.ranks.from_last_stage(metrics.reduce()),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            num_tokens=sum(int(batch.lengths[list(indices)].sum()) for indices in plan.micro_batches),
        )

    def _micro_batches(
        self, batch: BatchedDataDict, micro_batches: Sequence[Sequence[int]], **options: Any
    ) -> Iterator[_MicroBatch]:
        """One after another; an empty one has one token, so that the collectives stay aligned."""
        if options.get("with_top_ids"):
            check_ids(batch["top_ids"][batch["loss_mask"]], self.hf_config.vocab_size)
        for indices in micro_batches:
            selected = batch.select(indices)
            row_options = options if len(selected) else {**options, "with_top_ids": False}
            row = Row.of(
                selected if len(selected) else one_token(),
                self.ranks,
                split_tokens=self.model.config.sequence_parallel,
                **row_options,
            )
            yield _MicroBatch(indices, selected, row)

    def _run(self, rows: Iterator[_MicroBatch], count: int, step: Any, *, update: bool) -> None:
        """All micro-batches through the pipeline; `step(micro-batch, hidden states)` is called on its last stage."""

        def forward_step(iterator: Iterator[_MicroBatch], model: nn.Module) -> tuple[Tensor, Any]:
            """Return the output [T, 1, E] of this stage and what makes a loss of it."""
            micro = next(iterator)
            hidden = model(micro.row.input_ids, micro.row.position_ids, None, packed_seq_params=micro.row.packed)
            nothing = torch.zeros((), dtype=torch.int)
            return hidden, lambda states: (step(micro, states), nothing, None)

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=rows,
            model=[self.chunk],
            num_microbatches=count,
            seq_length=1,
            micro_batch_size=1,
            forward_only=not update,
        )

    def _forget_gradient(self) -> None:
        assert self.optimizer is not None
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _update(self, loss: Tensor) -> float:
        """Clip and step by the gradient of a loss []; returns its global norm before clipping."""
        assert self.optimizer is not None
        norm = self.optimizer.gradient_norm()
        if self.ranks.any_rank(~loss.isfinite() | torch.tensor(not math.isfinite(norm), device=loss.device)):
            self._forget_gradient()
            raise self._not_finite(loss, norm)
        self.optimizer.step()
        return norm

    # -- forward only -------------------------------------------------------------------------

    def _forward_only(
        self, batch: BatchedDataDict, micro_batches: Sequence[Sequence[int]], names: Iterable[str], **options: Any
    ) -> dict[str, Tensor]:
        """Return these outputs, [N] or [N, ...] each, for the N tokens, the same on every stage of the pipeline."""
        collected = PerToken(batch)

        def step(micro: _MicroBatch, hidden: Tensor) -> Tensor:
            """Collect the outputs of a micro-batch from its hidden states [T, 1, E]; returns a 0 [] to go back from."""
            found = self.outputs(hidden, micro.row, **options)
            collected.put(micro.indices, {name: found[name] for name in names})
            return found["anchor"]

        rows = self._micro_batches(batch, micro_batches, only_trained="loss_mask" in batch)
        with without_gpu(self.device):
            self._run(rows, len(micro_batches), step, update=False)
        found: dict[str, Tensor] = self.ranks.from_last_stage(collected.values)
        return found

    # -- weights out --------------------------------------------------------------------------

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, whole tensor [...]) in the precision that computes; tied weights come once."""
        self._check_here()
        yield from self.weights.export()

    def export_model(self, path: Path) -> None:
        """Write a Hugging Face checkpoint (config.json, safetensors) that `from_pretrained` loads."""
        name = str(self.config.model_name)
        model = load_model(name, dtype=self.dtype, head=self.config.head, empty=True) if self.ranks.is_first else None
        write_model(path, self.export_weights(), model)

    # -- checkpoints --------------------------------------------------------------------------

    def save_checkpoint(self, path: Path) -> None:
        """Write weights, optimizer, schedule and RNG into the existing folder `path`, which all ranks share.

        Raises:
            CheckpointError: It cannot be written; raised on every rank.
        """
        self._check_here()
        assert self.optimizer is not None
        rng = sealed_file.capture_rng(self.device)
        with without_gpu(self.device):
            checkpoint.save(Path(path), self.model, self.optimizer, self._identity(), rng)

    def _identity(self) -> dict[str, Any]:
        """What a run must have in common with the one that it continues; the layout is free."""
        return {
            "format": _FORMAT,
            "precision": self.config.precision,
            "optimizer": self.config.optimizer.name,
            "parameters": self.weights.shapes,
        }

    def load_checkpoint(self, path: Path) -> None:
        """Restore what `save_checkpoint` wrote in any layout, into the tensors that are there.

        Raises:
            CheckpointError: Names the file that is missing, damaged or of another model.
        """
        self._check_here()
        assert self.optimizer is not None
        with without_gpu(self.device):
            rng = checkpoint.load(Path(path), self.model, self.optimizer, self._identity())
            self._forget_gradient()
        sealed_file.restore_rng(rng, self.device)

    # -- place --------------------------------------------------------------------------------

    def parallel_axes(self) -> dict[str, int]:
        """The axes in megatron-core's order of ranks, tensor-parallel peers next to each other."""
        ranks = self.ranks
        return {"pp": ranks.pp_size, "dp": ranks.dp_size, "cp": ranks.cp_size, "tp": ranks.tp_size}

    def offload(self) -> None:
        """Move weights, master weights and the optimizer's state to the host's memory; gradients are forgotten."""
        if self._host.is_away:
            return
        held = [*self.model.parameters(), *self.model.buffers()]
        gradients: list[Tensor] = []
        if self.optimizer is not None:
            self.optimizer.zero_grad()
            held += self.optimizer.tensors()
            buffers = [*self.chunk.buffers, *self.chunk.expert_parallel_buffers]
            held += [buffer.param_data for buffer in buffers if buffer.param_data is not None]
            gradients = [buffer.grad_data for buffer in buffers]
        on_device = [tensor for tensor in held if tensor.device.type == self.device.type]
        self._host.offload(on_device, zeros=gradients)

    def shutdown(self) -> None:
        """Free the model and leave the process group; may be called twice."""
        if getattr(self, "_closed", True):
            return
        self._closed = True
        self.ranks.close()
        for name in ("model", "chunk", "optimizer", "weights", "outputs"):
            self.__dict__.pop(name, None)


def _sum_gradients(model: list[Any], num_tokens: Tensor | None, **options: object) -> None:
    """Reduce over the ranks without the division by tokens, which the core has done."""
    finalize_model_grads(model, None, **options)
