"""`DTensorBackend`: trains a Hugging Face causal language model with plain PyTorch.

Legend: B sequences, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from nemo_rl_core.backends import sealed_file
from nemo_rl_core.backends.base import TorchBackend
from nemo_rl_core.backends.per_token import PerToken, one_token
from nemo_rl_core.backends.schedule import make_scheduler
from nemo_rl_core.backends.step_metrics import StepMetrics
from nemo_rl_core.config.components import finished_options
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.infra.weights.fingerprint import fingerprint
from nemo_rl_core.models import load_model, load_model_config, write_model
from nemo_rl_core.models.numerics.over_vocabulary import OutputLayer
from nemo_rl_core.models.numerics.products import use_fast_linear
from nemo_rl_core.protocols.loss import LossSums, ModelOutputs
from nemo_rl_core.protocols.training_backend import LossFunction, ModelMemory, StepPlan, StepResult
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.schema import Mistake, mistake
from nemo_rl_plugins_dtensor.config import DTensorConfig, LoRAConfig
from nemo_rl_plugins_dtensor.lora import Adapters
from nemo_rl_plugins_dtensor.memory import model_memory
from nemo_rl_plugins_dtensor.network import PolicyNetwork, switch_off_dropout
from nemo_rl_plugins_dtensor.optimizer import (
    MasterWeights,
    local_optimizer_state,
    make_optimizer,
    optimizer_state,
)
from nemo_rl_plugins_dtensor.parallel import join, local_part, undivided_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nemo_rl_core.protocols.launcher import WorkerContext
    from nemo_rl_core.schema import PolicyConfig

__all__ = ["DTensorBackend"]

_FORMAT = 1


class DTensorBackend(TorchBackend):
    """PyTorch-native training on one device or on a mesh of data-parallel (FSDP2) by tensor-parallel processes.

    Dropout is switched off everywhere: the probability of a token must be one number, else the ratio between
    the policy that trains and the one that sampled is noise.
    """

    config_class: ClassVar[type] = DTensorConfig
    capabilities: frozenset[str] = frozenset(
        {
            "tensor_parallel",
            "exports_on_every_rank",
            "share_weights",
            "scalar_head",
            "top_logprobs",
            "over_vocabulary",
            "lora",
            "offload",
        }
    )

    @staticmethod
    def check(policy: PolicyConfig) -> Iterator[Mistake]:
        """Heads that tensor-parallel ranks cannot share out."""
        size = policy.tensor_parallel_size
        if size > 1:
            config = load_model_config(str(policy.model_name)).get_text_config()
            for name, heads in undivided_heads(config, size).items():
                problem = f"{size} does not divide the model's {name} {heads}"
                yield mistake("tensor_parallel_size", problem, "Use a size that divides all heads.")

    @staticmethod
    def memory(policy: PolicyConfig, model: object) -> ModelMemory:
        """Sharded over data-parallel workers; tensor-parallel ones split the linear layers of the decoder."""
        return model_memory(policy, model)

    def setup(self, config: PolicyConfig, context: WorkerContext) -> None:
        """Build or load the model and the optimizer on this rank.

        Raises:
            ConfigError: The model, the optimizer or the layout is not available.
        """
        self._begin(config, context)
        assert config.model_name is not None
        self.options: DTensorConfig = finished_options(type(self), config.options)
        self.ranks = join(config, context, self.device)
        bfloat16 = config.precision == "bfloat16"
        keeps_masters = bfloat16 and self.options.master_weights and config.trained
        # Weights that are not trained need no float32 master.
        # A frozen model, such as a teacher with the policy's options, has nothing to adapt.
        lora = self.options.lora if config.trained else None
        dtype = torch.bfloat16 if bfloat16 and (not keeps_masters or lora) else torch.float32
        model = load_model(config.model_name, dtype=dtype, seed=context.seed, head=config.head)
        switch_off_dropout(model)
        if not config.trained:
            model.requires_grad_(False)
        self.network = PolicyNetwork(
            model,
            attention=self.options.attention,
            chunk_size=config.logprob_chunk_size,
            share_prefixes=self.options.share_prefixes,
        )
        self.adapters: Adapters | None = None
        if lora is not None:
            self._adapt(model, context.seed, lora, dtype=torch.float32 if keeps_masters else dtype)
        if config.activation_checkpointing:
            # Renamed in transformers 5; both take the keyword arguments of torch's checkpoint first.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.network.train().to(self.device)
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32
        self.ranks.shard(self.network, bfloat16=keeps_masters)
        use_fast_linear(model)
        # FSDP keeps float32 shards and computes in bfloat16 by itself; these names outlive its gathering of weights.
        self.weights = dict(self.network.model.named_parameters())
        self.parameters = [p for p in self.weights.values() if p.requires_grad]
        self.masters = MasterWeights(self.parameters) if keeps_masters and self.ranks.dp_size == 1 else None
        if lora is not None:
            self._attach_adapters()
        self.optimizer: Any = None
        self.scheduler: Any = None
        if config.trained:
            self.optimizer = make_optimizer(config.optimizer, self._trained())
            self.scheduler = make_scheduler(config.scheduler, self.optimizer)
        self.gives, self.vocab_size = self.network.gives, self.network.head.weight.shape[0]
        self._closed = False

    def _adapt(self, model: PreTrainedModel, seed: int, lora: LoRAConfig, *, dtype: torch.dtype) -> None:
        """Put LoRA adapters into the model."""
        if self.config.tensor_parallel_size > 1:
            raise ConfigError(
                "policy.options.lora does not go with policy.tensor_parallel_size > 1: adapters are not split. Set it "
                "to 1; data-parallel workers (policy.num_workers) shard the model as well."
            )
        name = str(self.config.model_name)
        self.adapters = Adapters(model, lora, model_name=name, seed=seed, dtype=dtype)
        # What is exported are sums made for it; the weights themselves lack the adapters.
        self.capabilities = type(self).capabilities - {"share_weights"}
        self._at_start = ExitStack()

    def _attach_adapters(self) -> None:
        assert self.adapters is not None
        self.adapters.attach(self.weights)

    def _trained(self) -> list[Any]:
        """The tensors that the optimizer updates."""
        return list(self.parameters) if self.masters is None else self.masters.masters

    @property
    def model(self) -> Any:
        """The `transformers` model."""
        return self.network.model

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
        loss = torch.zeros((), device=self.device)
        num_tokens = 0
        if self.adapters is not None:
            self.adapters.train(plan.update)
        with torch.set_grad_enabled(plan.update):
            for index, indices in enumerate(plan.micro_batches):
                self.ranks.expect_reduction(self.network, last=index == len(plan.micro_batches) - 1)
                sums = self._micro_batch(batch.select(indices), loss_fn, plan, needs)
                if sums is not None:
                    metrics.add(sums.metrics)
                    loss += sums.total.detach()
                    num_tokens += int(batch.lengths[list(indices)].sum())
                if self.masters is not None:
                    self.masters.collect_gradients()
        if self.adapters is not None:
            self.adapters.train(False)
        learning_rate = float(self.optimizer.param_groups[0]["lr"]) if plan.update else 0.0
        grad_norm = self._update(loss) if plan.update else 0.0
        if not plan.update:
            self.ranks.reshard(self.network)
        return StepResult(
            metrics=metrics.reduce(), grad_norm=grad_norm, learning_rate=learning_rate, num_tokens=num_tokens
        )

    def _micro_batch(
        self, batch: BatchedDataDict, loss_fn: LossFunction, plan: StepPlan, needs: frozenset[str]
    ) -> LossSums | None:
        """Forward and backward; None for an empty micro-batch, which only keeps the collectives aligned."""
        if len(batch) == 0 and self.ranks.layout == "1x1":
            return None
        row = self.network.row(
            batch if len(batch) else one_token(),
            device=self.device,
            only_trained=True,
            with_top_ids=len(batch) > 0 and "top_logprobs" in needs,
            fields=getattr(loss_fn, "vocabulary_fields", ()) if len(batch) else (),
        )
        out = self.network(
            row,
            temperature=plan.temperature,
            needs=needs if len(batch) else frozenset(),
            function=getattr(loss_fn, "over_vocabulary", None),
        )
        sums = None
        total = out["anchor"]
        if len(batch):
            outputs = ModelOutputs(**{name: out[name] for name in needs})
            sums = loss_fn(outputs, batch if self.device.type == "cpu" else batch.to(self.device, non_blocking=True))
            total = sums.total if sums.total.requires_grad else sums.total + total
        if plan.update:
            (total if plan.gradient_scale == 1.0 else total * plan.gradient_scale).backward()
        return sums

    def _gradients(self) -> list[Tensor]:
        """Return the gradients [...] of what is trained, laid out as their parameters."""
        found = [p for p in self._trained() if p.grad is not None]
        for parameter in found:
            parameter.grad = self.ranks.as_parameter(parameter, parameter.grad)
        return [p.grad for p in found]

    def _update(self, loss: Tensor) -> float:
        """Clip, step and forget the gradient of a loss []; returns its global norm before clipping."""
        gradients = self._gradients()
        squared = self.ranks.squared_norm(gradients)
        total, bad = torch.stack([squared, self.ranks.any_rank(~loss.isfinite())]).tolist()
        if bad or not math.isfinite(total):
            self.optimizer.zero_grad(set_to_none=True)
            raise self._not_finite(loss, math.sqrt(total))
        norm = math.sqrt(total)
        limit = self.config.max_grad_norm
        if limit is not None and norm > limit:
            parts = [local_part(gradient) for gradient in gradients]
            torch._foreach_mul_(parts, limit / (norm + 1e-6))
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters is not None:
            self.masters.publish()
        return norm

    # -- forward only -----------------------------------------------------------------------------

    @torch.no_grad()
    def get_hidden_states(self, batch: BatchedDataDict, micro_batches: Sequence[Sequence[int]] | None = None) -> Tensor:
        """[N, E] inputs of the output layer that predict each trained token, on the CPU."""
        self._require(frozenset({"over_vocabulary"}))
        needs = frozenset({"hidden_states"})
        return self._outputs(batch, micro_batches, needs, needs=needs)["hidden_states"]

    @torch.no_grad()
    def get_output_layer(self) -> OutputLayer:
        """The output layer, gathered from all ranks, on the CPU; of ranks but the first without rows."""
        self._check_here()
        self._require(frozenset({"over_vocabulary"}))
        self.ranks.reshard(self.network)
        head = self.network.head
        found = [
            None if tensor is None else self.ranks.full(tensor, self.dtype)
            for tensor in (head.weight, getattr(head, "bias", None))
        ]
        weight, bias = (t if t is None else t[: len(t) if self.ranks.is_first else 0].cpu() for t in found)
        assert weight is not None
        return OutputLayer(weight=weight, bias=bias, transform=self.network.transform)

    def _forward_only(
        self, batch: BatchedDataDict, micro_batches: Sequence[Sequence[int]], names: Iterable[str], **options: object
    ) -> dict[str, Tensor]:
        """Return these outputs of the network, [N] or [N, ...] each, for the N tokens of the batch."""
        collected = PerToken(batch)
        for indices in micro_batches:
            selected = batch.select(indices)
            row = self.network.row(
                selected if len(selected) else one_token(), device=self.device, only_trained="loss_mask" in batch
            )
            found = self.network(row, **options)
            collected.put(indices, {name: found[name] for name in names})
        self.ranks.reshard(self.network)
        return collected.values

    # -- weights out --------------------------------------------------------------------------

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, full tensor [...]) in the precision that computes; tied weights come once.

        On one process these are the live tensors.
        """
        self._check_here()
        if self.adapters is not None:
            yield from self.adapters.merged(self.ranks.full, self.dtype)
            return
        for name, parameter in self.weights.items():
            yield name, self.ranks.full(parameter, self.dtype)

    def has_initial_weights(self) -> bool:
        """With adapters the model as it started is one switch away."""
        return self.adapters is not None

    def use_initial_weights(self, on: bool) -> None:
        """Compute with the weights of `setup`, until it is switched off."""
        if self.adapters is None:
            super().use_initial_weights(on)
            return
        self._at_start.close()
        if on:
            self._at_start.enter_context(self.adapters.at_start())

    def export_model(self, path: Path) -> None:
        """Write a Hugging Face checkpoint (config.json, safetensors) that `from_pretrained` loads.

        With adapters what `policy.options.lora.export` says: PEFT's files, the merged model, or both.
        """
        if self.adapters is not None and self.options.lora is not None and self.options.lora.export != "merged":
            alone = self.options.lora.export == "adapter"
            folder = path if alone else path / "adapter"
            self.adapters.save(folder, self.ranks.full, is_first=self.ranks.is_first)
            if alone:
                return
        state = self.model.state_dict()
        buffers = [(name, buffer) for name, buffer in self.model.named_buffers() if name in state]
        write_model(path, chain(self.export_weights(), buffers), self.model if self.ranks.is_first else None)

    # -- checkpoints --------------------------------------------------------------------------

    def save_checkpoint(self, path: Path) -> None:
        """Write weights, optimizer, scheduler and RNG into the existing folder `path`."""
        self._check_here()
        state = {
            "format": _FORMAT,
            "precision": self.config.precision,
            "layout": self.ranks.layout,
            "weights": {name: local_part(p.detach()) for name, p in self._held().items()},
            "base": self._base_fingerprint(),
            "masters": None if self.masters is None else [local_part(m) for m in self.masters.masters],
            "optimizer": local_optimizer_state(self.optimizer),
            "scheduler": self.scheduler.state_dict(),
            "rng": sealed_file.capture_rng(self.device),
        }
        sealed_file.write(Path(path) / self.ranks.file_name, state)

    def _held(self) -> dict[str, Any]:
        """The weights that a checkpoint holds: all, or the adapters alone."""
        return self.weights if self.adapters is None else self.adapters.trained()

    def _base_fingerprint(self) -> str | None:
        """Of the weights that a checkpoint of adapters lacks."""
        return None if self.adapters is None else fingerprint(self.adapters.frozen())

    def load_checkpoint(self, path: Path) -> None:
        """Restore what `save_checkpoint` wrote, into the tensors that are there.

        Raises:
            CheckpointError: Names the file that is missing, damaged or of another model or layout.
        """
        self._check_here()
        sealed_file.restore(Path(path) / self.ranks.file_name, self._restore)

    def _check_fits(self, state: dict[str, Any]) -> None:
        identity = {"format": _FORMAT, "precision": self.config.precision, "layout": self.ranks.layout}
        sealed_file.check_fits(state, identity, {name: local_part(p) for name, p in self._held().items()})
        if state.get("base") != self._base_fingerprint():
            raise ValueError("the weights below the adapters are others")
        if (state["masters"] is None) != (self.masters is None):
            raise ValueError("policy.options.master_weights differs")

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        self._check_fits(state)
        self.ranks.reshard(self.network)
        for name, parameter in self._held().items():
            local_part(parameter).copy_(state["weights"][name])
        if self.masters is not None:
            for master, saved in zip(self.masters.masters, state["masters"], strict=True):
                local_part(master).copy_(saved)
        self.optimizer.load_state_dict(optimizer_state(state["optimizer"], self.optimizer))
        self.scheduler.load_state_dict(state["scheduler"])
        self.optimizer.zero_grad(set_to_none=True)
        sealed_file.restore_rng(state["rng"], self.device)

    # -- place --------------------------------------------------------------------------------

    def parallel_axes(self) -> dict[str, int]:
        """Data-parallel by tensor-parallel ranks; the batch is sharded over the first."""
        return {"dp": self.ranks.dp_size, "tp": self.ranks.tp_size}

    def offload(self) -> None:
        """Move weights, master weights and the optimizer's state to the host's memory."""
        if not self._host.is_away:
            self.ranks.reshard(self.network)
            self._host.offload(tensor for tensor in self._held_tensors() if tensor.device.type == self.device.type)

    def _held_tensors(self) -> Iterator[Tensor]:
        """Yield the tensors [...] that take memory between two steps."""
        yield from self.network.parameters()
        yield from self.network.buffers()
        for trained in self._trained() if self.optimizer is not None else ():
            yield trained
            yield from (value for value in self.optimizer.state[trained].values() if isinstance(value, Tensor))

    def shutdown(self) -> None:
        """Leave the process group and free the model; may be called twice."""
        if getattr(self, "_closed", True):
            return
        self._closed = True
        self.ranks.close()
        del self.network, self.optimizer, self.scheduler, self.weights, self.parameters, self.masters, self.adapters
