"""Options of the backend (`policy.options`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import field, frozen

from nemo_rl_core.schema.validators import ge, optional

if TYPE_CHECKING:
    from nemo_rl_core.schema import PolicyConfig

__all__ = ["MegatronConfig"]


@frozen(kw_only=True)
class MegatronConfig:
    """`policy.options` of the megatron backend. Tensor parallelism is `policy.tensor_parallel_size`."""

    pipeline_parallel_size: int = field(default=1, validator=ge(1))
    """Stages, each with an equal share of the layers; divides the number of layers."""
    context_parallel_size: int = field(default=1, validator=ge(1))
    """Workers that share the tokens of each sequence."""
    expert_parallel_size: int = field(default=1, validator=ge(1))
    """Workers that share the experts of a mixture-of-experts model; they are taken from the data-parallel ones."""
    expert_tensor_parallel_size: int | None = field(default=None, validator=optional(ge(1)))
    """Workers that split each expert; None is `policy.tensor_parallel_size`."""
    sequence_parallel: bool = True
    """Where tensor_parallel_size is above 1, tensor-parallel workers share the tokens in norms and residuals too."""
    distributed_optimizer: bool = True
    """Data-parallel workers share optimizer state and float32 master weights (ZeRO-1) instead of each holding all."""
    recompute_layers: int = field(default=1, validator=ge(1))
    """With `policy.activation_checkpointing`: layers between two activations that are kept."""

    def layout(self, policy: PolicyConfig) -> Mapping[str, int]:
        """Tensor, pipeline and context parallelism make up a replica."""
        return {
            "tensor_parallel_size": policy.tensor_parallel_size,
            "options.pipeline_parallel_size": self.pipeline_parallel_size,
            "options.context_parallel_size": self.context_parallel_size,
        }
