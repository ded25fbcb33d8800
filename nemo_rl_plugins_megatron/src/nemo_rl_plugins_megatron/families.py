"""The model families that can be trained. A new one is added here, and only here.

A `Family` says which Hugging Face weights make which megatron-core weights, and how the Hugging Face configuration sets
the layers. What all families share is in `common_settings`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from attrs import frozen

from nemo_rl_core.errors import ConfigError
from nemo_rl_plugins_megatron.mapping import (
    Columns,
    FusedGate,
    Gate,
    Heads,
    QueryKeyValue,
    Rule,
    Vocabulary,
    Whole,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


__all__ = ["FAMILIES", "Family", "common_settings", "family_of", "heads_of"]

_OURS, _THEIRS = "decoder.layers.{layer}.", "model.layers.{layer}."


def _layer(ours: str, theirs: str, form: Any) -> Rule:
    return Rule(_OURS + ours, tuple(_THEIRS + name for name in theirs.split()), form)


_ENDS = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary()),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Whole()),
    Rule("output_layer.weight", ("lm_head.weight",), Vocabulary()),
    Rule("score.weight", ("score.weight",), Whole()),
)
_ATTENTION = (
    _layer("input_layernorm.weight", "input_layernorm.weight", Whole()),
    _layer(
        "self_attention.linear_qkv.weight",
        "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight",
        QueryKeyValue(),
    ),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", Columns()),
    _layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", Whole()),
)
_QKV_BIAS = (
    _layer(
        "self_attention.linear_qkv.bias",
        "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias",
        QueryKeyValue(),
    ),
)
_QK_NORM = (
    _layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", Whole()),
    _layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", Whole()),
)
_MLP = (
    _layer("mlp.linear_fc1.weight", "mlp.gate_proj.weight mlp.up_proj.weight", Gate()),
    _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight", Columns()),
)
_EXPERTS = (
    _layer("mlp.router.weight", "mlp.gate.weight", Whole()),
    _layer("mlp.experts.local_experts.{expert}.linear_fc1.weight", "mlp.experts.gate_up_proj", FusedGate()),
    _layer("mlp.experts.local_experts.{expert}.linear_fc2.weight", "mlp.experts.down_proj", Columns()),
)


@frozen(kw_only=True)
class Family:
    """How a model type of Hugging Face is built of megatron-core's layers."""

    rules: tuple[Rule, ...]
    """Of all weights that some model of the family has."""
    settings: Callable[[Any], dict[str, Any]]
    """Fields of `TransformerConfig` beyond `common_settings`, from the Hugging Face configuration."""


def _mixture_of_experts(config: PreTrainedConfig) -> dict[str, Any]:
    layers = range(config.num_hidden_layers)
    sparse = [i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0 for i in layers]
    return {
        "qk_layernorm": True,
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_layer_freq": [int(one) for one in sparse],
        "moe_router_topk": config.num_experts_per_tok,
        # Softmax over the chosen experts alone is softmax over all, scaled to a sum of 1.
        "moe_router_pre_softmax": not config.norm_topk_prob,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


FAMILIES: dict[str, Family] = {
    "llama": Family(rules=(*_ENDS, *_ATTENTION, *_MLP), settings=lambda config: {}),
    "qwen2": Family(rules=(*_ENDS, *_ATTENTION, *_QKV_BIAS, *_MLP), settings=lambda config: {"add_qkv_bias": True}),
    "qwen3": Family(rules=(*_ENDS, *_ATTENTION, *_QK_NORM, *_MLP), settings=lambda config: {"qk_layernorm": True}),
    "qwen3_moe": Family(rules=(*_ENDS, *_ATTENTION, *_QK_NORM, *_MLP, *_EXPERTS), settings=_mixture_of_experts),
}
"""By `model_type` of the Hugging Face configuration."""


def family_of(config: Any) -> Family:
    """The family of a Hugging Face configuration.

    Raises:
        ConfigError: It is none of ours, or the model does something that its family here does not do.
    """
    found = FAMILIES.get(config.model_type)
    if found is None:
        raise ConfigError(
            f"The megatron backend cannot train models of type {config.model_type!r}; it knows {', '.join(FAMILIES)}. "
            "Set policy.backend: dtensor, or add the family to nemo_rl_plugins_megatron/families.py."
        )
    odd = {
        "hidden_act": getattr(config, "hidden_act", "silu") != "silu",
        "attention_bias": bool(getattr(config, "attention_bias", False)),
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        "layer_types": "sliding_attention" in (getattr(config, "layer_types", None) or ()),
        "sliding_window": bool(getattr(config, "use_sliding_window", False) and config.sliding_window),
    }
    for name, is_odd in odd.items():
        if is_odd:
            raise ConfigError(
                f"The megatron backend cannot train this {config.model_type} model: {name} is "
                f"{getattr(config, name)!r}, which its layers do not do. Set policy.backend: dtensor."
            )
    return found


def common_settings(config: Any) -> dict[str, Any]:
    """Fields of `TransformerConfig` that every family takes from the Hugging Face configuration."""
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": _head_size(config),
        "layernorm_epsilon": config.rms_norm_eps,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
    }


def heads_of(config: PreTrainedConfig) -> Heads:
    """The sizes that the rules need."""
    return Heads(num_groups=config.num_key_value_heads, head_size=_head_size(config), vocab_size=config.vocab_size)


def _head_size(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
