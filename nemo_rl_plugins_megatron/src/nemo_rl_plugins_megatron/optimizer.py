"""Megatron-core's optimizer, set as `policy.optimizer` says, and its state."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.training.schedule import check_schedule, learning_rate_factor
from nemo_rl_plugins_megatron._megatron import OptimizerConfig, get_megatron_optimizer

if TYPE_CHECKING:
    from nemo_rl_core.config.schema import PolicyConfig

__all__ = ["Optimizer"]

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

    def __init__(self, policy: PolicyConfig, model: Any, *, distributed: bool) -> None:
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

    def _torch_optimizers(self) -> list[Any]:
        chained = getattr(self.inner, "chained_optimizers", [self.inner])
        return [one.optimizer for one in chained if one.optimizer is not None]

    @staticmethod
    def _stepped(optimizer: Any) -> list[Tensor]:
        """What it updates: weights, or their float32 masters, or this rank's share of either."""
        return [p for group in optimizer.param_groups for p in group["params"]]

    def state(self) -> dict[str, Any]:
        """This rank's part, ready for `torch.save`."""
        return {
            "num_steps": self.num_steps,
            "parts": [
                {"state": one.state_dict(), "stepped": [p.detach() for p in self._stepped(one)]}
                for one in self._torch_optimizers()
            ],
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Undo what happened since `state`.

        Raises:
            ValueError: It is of other weights.
        """
        optimizers = self._torch_optimizers()
        for one, part in zip(optimizers, state["parts"], strict=True):
            found, saved = self._stepped(one), part["stepped"]
            if [p.shape for p in found] != [p.shape for p in saved]:
                raise ValueError("the optimizer's tensors have other shapes")
            for parameter, value in zip(found, saved, strict=True):
                parameter.copy_(value)
            one.load_state_dict(part["state"])
        self.num_steps = int(state["num_steps"])
