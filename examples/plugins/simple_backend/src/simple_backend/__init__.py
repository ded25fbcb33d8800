"""A training backend in one file: plain PyTorch on one device, one sequence at a time, nothing clever.

Slow, but a good start: each method does what its contract asks and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from attrs import frozen
from torch import Tensor

from nemo_rl_core.errors import CheckpointError, ConfigError
from nemo_rl_core.models import load_model
from nemo_rl_core.protocols.loss import Metric, ModelOutputs
from nemo_rl_core.protocols.training_backend import StepPlan, StepResult, TrainingBackend

if TYPE_CHECKING:
    from nemo_rl_core.protocols.launcher import WorkerContext
    from nemo_rl_core.protocols.training_backend import LossFunction
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_core.schema import PolicyConfig, SchedulerConfig

__all__ = ["SimpleBackend", "SimpleConfig"]


@frozen(kw_only=True)
class SimpleConfig:
    """`policy.options` of this backend."""

    fused: bool = False
    """Let the optimizer update all weights in one call."""


class SimpleBackend(TrainingBackend):
    """AdamW on one device."""

    config_class: ClassVar[type] = SimpleConfig
    capabilities: ClassVar[frozenset[str]] = frozenset({"share_weights"})
    conformance: ClassVar[Mapping[str, Any]] = {"num_processes": 0}  # one process is all that it has

    def setup(self, config: PolicyConfig, context: WorkerContext) -> None:
        """Load the model. Raises ConfigError for what this backend cannot do."""
        if context.world_size > 1:
            raise ConfigError("The simple backend trains in one process. Set policy.num_workers: 1.")
        if config.model_name is None:
            raise ConfigError("policy.model_name is not set.")
        self.config, self.device = config, torch.device(context.device)
        self.model = load_model(config.model_name, dtype=getattr(torch, config.precision), seed=context.seed)
        self.model.eval().to(self.device)  # without dropout: sampling has none, so the policy has none
        chosen = config.optimizer
        if chosen.name != "torch.optim.AdamW":
            raise ConfigError(
                f"The simple backend has AdamW alone, not {chosen.name}. Leave out policy.optimizer.name."
            )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=chosen.lr,
            betas=chosen.betas,
            eps=chosen.eps,
            weight_decay=chosen.weight_decay,
            fused=config.options.fused,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(_rate, config.scheduler))

    def _outputs(self, batch: BatchedDataDict, temperature: float, needs: frozenset[str]) -> ModelOutputs:
        """The forward pass of every sequence of a micro-batch by itself."""
        logprobs, entropies, all_logits = [], [], []
        for ids in batch.unpack("input_ids"):
            ids = ids.to(self.device)
            logits = self.model(input_ids=ids[None]).logits[0].float() / temperature
            shifted = torch.cat([torch.zeros_like(logits[:1]), logits[:-1]])  # what predicts each token
            distribution = shifted.log_softmax(-1)
            chosen = distribution.gather(-1, ids[:, None])[:, 0]
            first = torch.arange(len(ids), device=self.device) == 0
            logprobs.append(chosen.masked_fill(first, 0.0))
            if "entropy" in needs:
                entropies.append(-(distribution.exp() * distribution).sum(-1).masked_fill(first, 0.0))
            if "logits" in needs:
                all_logits.append(shifted)
        return ModelOutputs(
            logprobs=torch.cat(logprobs),
            entropy=torch.cat(entropies) if entropies else None,
            logits=torch.cat(all_logits) if all_logits else None,
        )

    def train_step(self, batch: BatchedDataDict, loss_fn: LossFunction, plan: StepPlan) -> StepResult:
        """Backward of every micro-batch, then one step of SGD."""
        needs = frozenset(getattr(loss_fn, "needs", ()))
        if unknown := needs - {"logprobs", "entropy", "logits"}:
            raise ConfigError(f"The loss needs {sorted(unknown)}, which the simple backend does not compute.")
        found: dict[str, list[Metric]] = {}
        num_tokens = 0
        with torch.set_grad_enabled(plan.update):
            for indices in plan.micro_batches:
                if not len(indices):
                    continue
                part = batch.select(list(indices)).to(self.device)
                sums = loss_fn(self._outputs(part, plan.temperature, needs), part)
                if plan.update and sums.total.requires_grad:
                    (sums.total * plan.gradient_scale).backward()
                for name, metric in sums.metrics.items():
                    found.setdefault(name, []).append(metric)
                num_tokens += part.num_tokens
        learning_rate = float(self.scheduler.get_last_lr()[0])
        norm = self._update() if plan.update else 0.0
        return StepResult(
            metrics={name: _added(metrics) for name, metrics in found.items()},
            grad_norm=norm,
            learning_rate=learning_rate,
            num_tokens=num_tokens,
        )

    def _update(self) -> float:
        limit = self.config.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), float("inf") if limit is None else limit)
        if norm.isfinite():
            self.optimizer.step()
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)  # one that is not finite is reported by the core

    @torch.no_grad()
    def get_logprobs(
        self, batch: BatchedDataDict, temperature: float = 1.0, micro_batches: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """[N] logprobs of the batch's tokens; one sequence's logits are held at a time."""
        found = self._outputs(batch, temperature, frozenset()).logprobs
        assert found is not None
        return found.cpu()

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The live tensors; `named_parameters` names a tied one once."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def save_checkpoint(self, path: Path) -> None:
        """Everything in one file, after a digest of it."""
        parts = {"weights": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        state = {name: part.state_dict() for name, part in parts.items()}
        buffer = io.BytesIO()
        torch.save({**state, "rng": torch.get_rng_state()}, buffer)
        data = buffer.getvalue()
        (Path(path) / "simple.pt").write_bytes(hashlib.sha256(data).digest() + data)

    def load_checkpoint(self, path: Path) -> None:
        """What `save_checkpoint` wrote. Raises CheckpointError naming the file."""
        file = Path(path) / "simple.pt"
        try:
            data = file.read_bytes()
            if hashlib.sha256(data[32:]).digest() != data[:32]:
                raise ValueError("the file is damaged")
            state: dict[str, Any] = torch.load(io.BytesIO(data[32:]), map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            torch.set_rng_state(state["rng"].cpu())
        except Exception as error:  # torch.load raises half a dozen types for a damaged file
            raise CheckpointError(f"Cannot load {file}: {type(error).__name__}: {error}") from error

    def export_model(self, path: Path) -> None:
        """A Hugging Face checkpoint."""
        self.model.save_pretrained(path)


def _rate(config: SchedulerConfig, step: int) -> float:
    """The share of the peak learning rate at an optimizer step, from 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    span = (config.total_steps or 0) - config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / span) if span > 0 else 0.0
    decay = {"constant": 0.0, "linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2}[config.name]
    return 1 - (1 - config.min_lr_ratio) * decay


def _added(metrics: Sequence[Metric]) -> Metric:
    """The metrics of all micro-batches as one of plain floats."""
    totals = [float(metric.total) for metric in metrics]
    combine = {"min": min, "max": max}.get(metrics[0].reduction, sum)
    return Metric(combine(totals), sum(float(metric.count) for metric in metrics), metrics[0].reduction)
