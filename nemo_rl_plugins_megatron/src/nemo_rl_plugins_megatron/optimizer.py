"""Megatron-core's optimizer, set as `policy.optimizer` says, and its state."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor

from nemo_rl_core.backends.schedule import check_schedule, learning_rate_factor
from nemo_rl_core.errors import ConfigError
from nemo_rl_plugins_megatron._megatron import OptimizerConfig, get_megatron_optimizer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from nemo_rl_core.schema import PolicyConfig

__all__ = ["Optimizer", "Share"]

_KINDS: dict[str, dict[str, Any]] = {
    "torch.optim.AdamW": {"optimizer": "adam", "decoupled_weight_decay": True},
    "torch.optim.Adam": {"optimizer": "adam", "decoupled_weight_decay": False},
    "torch.optim.SGD": {"optimizer": "sgd"},
}


def _optimizer_config(policy: PolicyConfig, *, distributed: bool) -> Any:
    ours = policy.optimizer
    if ours.name not in _KINDS:
        raise ConfigError(
            f"policy.optimizer.name is {ours.name!r}, which megatron-core does not have. Choose one of "
            f"{', '.join(_KINDS)}, or set policy.backend: dtensor."
        )
    if distributed and ours.name == "torch.optim.SGD":
        raise ConfigError(
            "policy.optimizer.name is 'torch.optim.SGD', which megatron-core's distributed optimizer does not do. Set "
            "policy.options.distributed_optimizer: false, or use torch.optim.AdamW."
        )
    options = {"sgd_momentum" if name == "momentum" else name: value for name, value in ours.options.items()}
    known = {field.name for field in dataclasses.fields(OptimizerConfig)}
    if unknown := options.keys() - known:
        raise ConfigError(
            f"policy.optimizer.options: megatron-core's optimizers take no {', '.join(sorted(unknown))}. Known are "
            f"{', '.join(sorted(known))}."
        )
    settings: dict[str, Any] = {
        **_KINDS[ours.name],
        "lr": ours.lr,
        "weight_decay": ours.weight_decay,
        "adam_beta1": ours.betas[0],
        "adam_beta2": ours.betas[1],
        "adam_eps": ours.eps,
        "sgd_momentum": 0.0,
        "clip_grad": policy.max_grad_norm or 0.0,
        "bf16": policy.precision == "bfloat16",
        "params_dtype": torch.bfloat16 if policy.precision == "bfloat16" else torch.float32,
        "use_distributed_optimizer": distributed,
        **options,
    }
    return OptimizerConfig(**settings)


@contextmanager
def _quiet() -> Iterator[None]:
    """The distributed optimizer steps views of float32 weights and keeps their gradients itself, so PyTorch warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        yield


class Optimizer:
    """Steps the weights of a model.

    Args:
        policy: Its `optimizer`, `scheduler`, `max_grad_norm` and `precision`.
        model: This rank's part, wrapped for data-parallel training.
        distributed: Share state and master weights over data-parallel ranks.

    Raises:
        ConfigError: No such optimizer, or a decay without an end.
    """

    def __init__(self, policy: PolicyConfig, model: nn.Module, *, distributed: bool) -> None:
        check_schedule(policy.scheduler)
        self.policy = policy
        config = _optimizer_config(policy, distributed=distributed)
        # No overrides: weight decay is on every weight, as in the other backends.
        self.inner = get_megatron_optimizer(config, [model], config_overrides={}, use_gloo_process_groups=False)
        self.num_steps = 0

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self.policy.optimizer.lr * learning_rate_factor(self.policy.scheduler, self.num_steps)

    def zero_grad(self) -> None:
        """Forget the gradient."""
        with _quiet():
            self.inner.zero_grad()

    def gradient_norm(self) -> float:
        """Of the reduced gradient, over all ranks, before clipping."""
        with _quiet():
            self.inner.prepare_grads()
            return float(self.inner.get_grad_norm())

    def step(self) -> None:
        """Clip and update, after `gradient_norm`."""
        for group in self.inner.param_groups:
            group["lr"] = self.learning_rate
        with _quiet():
            self.inner.step()
        self.num_steps += 1

    # -- state --------------------------------------------------------------------------------

    def shares(self) -> Iterator[Share]:
        """What this rank holds for each weight, in the same order on all ranks that share it."""
        for part in self._parts():
            self._fill(part)
            yield from self._divided(part) if hasattr(part, "gbuf_ranges") else self._undivided(part)

    def tensors(self) -> list[Tensor]:
        """Return master weights and state [...]: all that it holds beside the model's weights."""
        stepped = [p for part in self._parts() for group in part.optimizer.param_groups for p in group["params"]]
        states = [state for part in self._parts() for state in part.optimizer.state.values()]
        return stepped + [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def restored(self, num_steps: int) -> None:
        """Say that the tensors of the shares are as they were after so many steps."""
        self.num_steps = num_steps
        for part in self._parts():
            for state in part.optimizer.state.values():
                if "step" in state:
                    state["step"].fill_(num_steps)
            if part.config.optimizer == "adam" and not _counts_per_tensor(part.optimizer):
                for group in part.optimizer.param_groups:
                    group["step"] = num_steps

    def _parts(self) -> list[Any]:
        """Megatron-core has an optimizer for the experts and one for the rest; a rank may have none of one."""
        chained = getattr(self.inner, "chained_optimizers", [self.inner])
        return [part for part in chained if part.optimizer is not None]

    def _fill(self, part: Any) -> None:
        """Make the state that the first step would make; it starts at zero."""
        state = part.optimizer.state
        for stepped in (p for group in part.optimizer.param_groups for p in group["params"]):
            for name in _state_names(part.config):
                if state[stepped].get(name) is None:
                    state[stepped][name] = torch.zeros_like(stepped)
            if _counts_per_tensor(part.optimizer) and "step" not in state[stepped]:
                state[stepped]["step"] = torch.zeros((), dtype=torch.float32)

    def _tensors(self, part: Any, stepped: Tensor) -> dict[str, Tensor]:
        found = {name: part.optimizer.state[stepped][name] for name in _state_names(part.config)}
        return {**found, "param": stepped.detach()} if self._has_masters else found

    @property
    def _has_masters(self) -> bool:
        """Whether it steps float32 copies of the weights; else the weights themselves."""
        return self.policy.precision == "bfloat16"

    def _undivided(self, part: Any) -> Iterator[Share]:
        groups = part.float16_groups if self._has_masters else [g["params"] for g in part.optimizer.param_groups]
        for weight in (weight for group in groups for weight in group):
            tensors = self._tensors(part, weight.main_param if self._has_masters else weight)
            yield Share(weight=weight, part=slice(0, weight.numel()), group=None, tensors=tensors)

    def _divided(self, part: Any) -> Iterator[Share]:
        buckets = [bucket for types in part.gbuf_ranges for found in types.values() for bucket in found]
        held = {weight: ranges["param"] for bucket in buckets for weight, ranges in bucket["param_map"].items()}
        names = _state_names(part.config) + (("param",) if self._has_masters else ())
        for weight in (weight for buffer in part.buffers for weight in buffer.param_index_map):
            if weight in held:
                group, position = part.model_param_group_index_map[weight]
                tensors = self._tensors(part, part.optimizer.param_groups[group]["params"][position])
                where = slice(held[weight].start, held[weight].end)
            else:
                where, tensors = slice(0, 0), {name: weight.new_empty(0, dtype=torch.float32) for name in names}
            yield Share(weight=weight, part=where, group=part.data_parallel_group, tensors=tensors)


@frozen(kw_only=True, eq=False)
class Share:
    """What a rank's optimizer holds for one weight."""

    weight: Tensor
    part: slice
    """Of the flattened weight; empty if other ranks hold it all."""
    group: Any
    """The ranks that share it out; None if this one has it all."""
    tensors: dict[str, Tensor]
    """The optimizer's state by name, and the float32 master weight as `param` if there is one; as long as `part`."""


def _state_names(config: PreTrainedConfig) -> tuple[str, ...]:
    """Of the tensors that an optimizer keeps for each weight."""
    return ("exp_avg", "exp_avg_sq") if config.optimizer == "adam" else ("momentum_buffer",) * bool(config.sgd_momentum)


def _counts_per_tensor(optimizer: object) -> bool:
    """PyTorch's Adam keeps the number of steps with each tensor; Transformer Engine's with each group."""
    return isinstance(optimizer, torch.optim.Adam)  # AdamW is one
