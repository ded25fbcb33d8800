"""What the models of a run need of a device's memory, estimated from their shapes."""

from __future__ import annotations

from typing import Any, Literal

from attrs import frozen

from nemo_rl_core.config.schema import PolicyConfig, RunConfig
from nemo_rl_core.training.device_turns import share_devices

__all__ = ["MemoryEstimate", "estimate_memory"]

_BYTES = {"float32": 4, "bfloat16": 2}
_ACTIVATION_ELEMENTS = 17
"""Elements that a transformer layer keeps for the backward pass, per token and hidden unit, without the attention
matrix (arXiv:2205.05198 eq. 2: 34 bytes in 16 bits)."""


@frozen(kw_only=True)
class MemoryEstimate:
    """Bytes on one device of each side."""

    num_parameters: int
    trainer_weights: float
    """Weights, gradients and the two moments of the optimizer, shared by the workers."""
    trainer_activations: float
    """Of one micro-batch."""
    engine_weights: float
    engine_cache: float
    """Keys and values of a full batch, every sequence at its longest."""
    sharing: Literal["apart", "in_turn", "together"] = "apart"
    """Whether trainer and engine have devices of their own, take turns on one, or hold it at the same time."""

    @property
    def trainer(self) -> float:
        """One training worker."""
        return self.trainer_weights + self.trainer_activations

    @property
    def engine(self) -> float:
        """One engine."""
        return self.engine_weights + self.engine_cache

    @property
    def device(self) -> float:
        """The most that one device holds. In turn both have their weights there only during a refit."""
        if self.sharing == "together":
            return self.trainer + self.engine
        refit = self.trainer_weights + self.engine_weights if self.sharing == "in_turn" else 0.0
        return max(self.trainer, self.engine, refit)


def estimate_memory(config: RunConfig, *, engine_batch: int, devices_per_engine: int = 1) -> MemoryEstimate:
    """The memory of the policy's workers and of the engines; no weights are loaded.

    Args:
        config: Of the run.
        engine_batch: Sequences that one engine decodes together.
        devices_per_engine: That share one engine's weights and cache.

    Raises:
        ConfigError: There is no such model.
    """
    import torch

    from nemo_rl_core.models import load_model

    policy: PolicyConfig = config.policy
    model = load_model(policy.model_name or "", dtype=torch.float32, empty=True)
    num_parameters = sum(p.numel() for p in model.parameters())
    shape = model.config.get_text_config()
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    trained, sampled = _BYTES[policy.precision], _BYTES[config.generation.precision or policy.precision]
    tokens = max(policy.token_budget("cuda"), policy.max_sequence_length)
    kept = tokens * hidden * _ACTIVATION_ELEMENTS * trained / policy.tensor_parallel_size
    activations = kept + layers * tokens * hidden * trained if policy.activation_checkpointing else layers * kept
    logits = 3 * policy.logprob_chunk_size * shape.vocab_size * 4
    return MemoryEstimate(
        num_parameters=num_parameters,
        trainer_weights=4 * num_parameters * trained / policy.num_workers,
        trainer_activations=activations + logits,
        engine_weights=num_parameters * sampled / devices_per_engine,
        sharing=_sharing(config),
        engine_cache=engine_batch * policy.max_sequence_length * _cache_elements(shape) * sampled / devices_per_engine,
    )


def _sharing(config: RunConfig) -> Literal["apart", "in_turn", "together"]:
    """On the accelerators of the cluster that is planned."""
    if not share_devices(config):
        return "apart"
    return "together" if config.rollouts.staleness or config.cluster.offload == "never" else "in_turn"


def _cache_elements(shape: Any) -> int:
    """Elements of keys and values of one token."""
    heads = shape.num_attention_heads
    kv_heads = getattr(shape, "num_key_value_heads", None) or heads
    size = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    return int(2 * shape.num_hidden_layers * kv_heads * size)
