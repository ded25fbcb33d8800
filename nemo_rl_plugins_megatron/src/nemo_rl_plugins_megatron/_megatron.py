"""What this package uses of megatron-core, in one place.

Importing megatron-core warns about each optional accelerator library that is missing; here is where those are quiet.
"""

from __future__ import annotations

import importlib.metadata
import warnings

from packaging.version import Version

from nemo_rl_core.errors import ConfigError
from nemo_rl_plugins_megatron.cpu import without_compiler

__all__ = [
    "CheckpointingException",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "GPTModel",
    "IdentityOp",
    "LanguageModule",
    "LocalSpecProvider",
    "ModuleSpec",
    "OptimizerConfig",
    "PackedSeqParams",
    "SelfAttention",
    "SelfAttentionSubmodules",
    "ShardedObject",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "TransformerLayerSubmodules",
    "check_version",
    "dist_checkpointing",
    "finalize_model_grads",
    "get_bias_dropout_add",
    "get_forward_backward_func",
    "get_megatron_optimizer",
    "get_mlp_module_spec_for_backend",
    "get_transformer_layer_offset",
    "layers",
    "mappings",
    "parallel_state",
    "rope_utils",
    "torch_strategy",
]

_LOWEST, _TOO_HIGH = Version("0.16.1"), Version("0.17")


def check_version() -> None:
    """Refuse a megatron-core that this package was not tested with.

    Raises:
        ConfigError: Says which versions fit.
    """
    found = importlib.metadata.version("megatron-core")
    if not _LOWEST <= Version(found) < _TOO_HIGH:
        raise ConfigError(
            f"nemo-rl-megatron was tested with megatron-core {_LOWEST} up to, not including, {_TOO_HIGH}; installed is "
            f"{found}. Run: pip install 'megatron-core>={_LOWEST},<{_TOO_HIGH}'"
        )


with warnings.catch_warnings(), without_compiler():
    warnings.simplefilter("ignore")
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import CheckpointingException, ShardedObject
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.tensor_parallel import layers, mappings
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
        get_transformer_layer_offset,
    )

if not hasattr(moe_utils, "te_general_gemm"):
    # Asked for on every call of a router, but only defined where Transformer Engine is installed.
    moe_utils.te_general_gemm = None
