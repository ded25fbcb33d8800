"""The model: megatron-core's `GPTModel` up to the last hidden states, with the head that the role needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nemo_rl_core.errors import ConfigError
from nemo_rl_plugins_megatron._megatron import (
    GPTModel,
    IdentityOp,
    LanguageModule,
    LocalSpecProvider,
    ModuleSpec,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_bias_dropout_add,
    get_mlp_module_spec_for_backend,
    get_transformer_layer_offset,
    layers,
    rope_utils,
)
from nemo_rl_plugins_megatron.attention import PackedAttention
from nemo_rl_plugins_megatron.cpu import NO_FUSIONS
from nemo_rl_plugins_megatron.families import common_settings, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from nemo_rl_core.schema import PolicyConfig
    from nemo_rl_plugins_megatron.config import MegatronConfig
    from nemo_rl_plugins_megatron.parallel import Ranks

__all__ = ["PolicyModel", "build_model", "check_rope", "freeze_embedding_of", "fusions", "transformer_config"]


class _RMSNorm(nn.Module):
    """Root mean square norm, in float32, as the Hugging Face models do it; its weight may see a share of the tokens."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x [..., E]."""
        exact = x.float()
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(x.dtype)


class _Modules(LocalSpecProvider):
    """Megatron-core's own layers, with norms that know sequence parallelism and attention over packed sequences."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """The norm."""
        return _RMSNorm

    def core_attention(self) -> type:
        """The attention."""
        return PackedAttention


def _layer_spec(config: TransformerConfig, *, sparse: bool) -> ModuleSpec:
    modules = _Modules()
    norm = modules.layer_norm()
    head_norm = norm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                submodules=SelfAttentionSubmodules(
                    linear_qkv=modules.column_parallel_linear(),
                    core_attention=modules.core_attention(),
                    linear_proj=modules.row_parallel_linear(),
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec_for_backend(
                backend=modules, num_experts=config.num_moe_experts if sparse else None, moe_grouped_gemm=False
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage."""
    frequency = config.moe_layer_freq
    sparse = list(frequency) if isinstance(frequency, list) else [0] * config.num_layers
    first = get_transformer_layer_offset(config)
    count = config.num_layers // config.pipeline_model_parallel_size
    specs = [_layer_spec(config, sparse=bool(sparse[i])) for i in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=_RMSNorm)


class PolicyModel(GPTModel):
    """Gives the hidden states that the output layer would see; the output layer is applied chunk by chunk elsewhere."""

    def _postprocess(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        return hidden_states

    def with_scalar_head(self) -> PolicyModel:
        """One number for each token in place of the vocabulary, on the last pipeline stage."""
        if self.post_process:
            del self.output_layer
            self.score = nn.Linear(self.config.hidden_size, 1, bias=False, dtype=self.config.params_dtype)
        return self

    def sharded_state_dict(self, *args: object, **kwargs: object) -> Any:
        """The weights with their places in the whole model, for distributed checkpoints."""
        if not hasattr(self, "output_layer") and self.post_process:
            return super(LanguageModule, self).sharded_state_dict(*args, **kwargs)  # without its rules for that layer
        return super().sharded_state_dict(*args, **kwargs)

    @property
    def vocabulary_weight(self) -> Tensor:
        """[V / tensor-parallel size, E] this rank's rows of the output layer."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()  # type: ignore[no-any-return]
        return self.output_layer.weight  # type: ignore[no-any-return]


def fusions(device: torch.device, *, trained: bool) -> dict[str, bool]:
    """Megatron-core's fused kernels that the device and what is installed beside it can do."""
    if device.type == "cpu":
        return dict(NO_FUSIONS)
    return {
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        # Of Transformer Engine.
        "apply_rope_fusion": rope_utils.fused_apply_rotary_pos_emb_thd is not None,
        # Of Apex: the backward pass of a linear layer adds to the float32 gradient itself.
        "gradient_accumulation_fusion": trained and layers._grad_accum_fusion_available,
    }


def transformer_config(hf_config: object, policy: PolicyConfig, options: MegatronConfig, ranks: Ranks) -> Any:
    """Megatron-core's configuration of the model on these ranks."""
    dtype = torch.bfloat16 if policy.precision == "bfloat16" else torch.float32
    recompute = (
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": options.recompute_layers,
        }
        if policy.activation_checkpointing and policy.trained
        else {}
    )
    return TransformerConfig(
        **common_settings(hf_config),
        **family_of(hf_config).settings(hf_config),
        **recompute,
        tensor_model_parallel_size=ranks.tp_size,
        pipeline_model_parallel_size=ranks.pp_size,
        context_parallel_size=ranks.cp_size,
        expert_model_parallel_size=ranks.ep_size,
        expert_tensor_parallel_size=ranks.etp_size,
        sequence_parallel=options.sequence_parallel and ranks.tp_size > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Micro-batches have different numbers of tokens.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # Losses come divided by the global count; nothing may divide them again.
        calculate_per_token_loss=True,
        # A token must have one probability.
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Without it megatron-core does not mark which weights are shares, and counts gradients wrongly.
        perform_initialization=True,
        use_cpu_initialization=ranks.device.type == "cpu",
        **fusions(ranks.device, trained=policy.trained),
        # Of layers that are not used here.
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        cuda_graph_scope=[],  # its default warns
    )


def build_model(
    hf_config: PreTrainedConfig, policy: PolicyConfig, options: MegatronConfig, ranks: Ranks
) -> PolicyModel:
    """This rank's part of the model, its weights not set yet.

    Raises:
        ConfigError: Its position embedding is not rotary with fixed frequencies.
    """
    config = transformer_config(hf_config, policy, options, ranks)
    is_scalar = policy.head == "scalar"
    share = -(-hf_config.vocab_size // ranks.tp_size)
    model = PolicyModel(
        config,
        _block_spec(config),
        vocab_size=share * ranks.tp_size,
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=ranks.pp_index == 0,
        post_process=ranks.is_last_stage,
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings and not is_scalar,
        position_embedding_type="rope",
        rotary_base=_rope(hf_config)["rope_theta"],
    )
    if is_scalar:
        model.with_scalar_head()
    model.rotary_pos_emb.inv_freq = _frequencies(hf_config).to(ranks.device)
    return model.to(ranks.device)  # type: ignore[no-any-return]


def freeze_embedding_of(model: PolicyModel, token: int | None, ranks: Ranks) -> None:
    """Give the embedding of this token no gradient from where the token is read, as Hugging Face's padding index does.

    A policy can sample its padding token; what it learns then must not depend on the backend. A head that is tied to
    the embedding still gets its part of the gradient.
    """
    if token is None or not model.pre_process:
        return

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], embedded: Tensor) -> Tensor:
        """Return the embeddings [T, B, E], those of the frozen token detached."""
        frozen = (kwargs["input_ids"] == token).transpose(0, 1)[..., None]
        if len(frozen) > len(embedded):  # tensor-parallel ranks share the tokens
            frozen = frozen.chunk(ranks.tp_size)[ranks.tp_index]
        return torch.where(frozen, embedded.detach(), embedded)

    model.embedding.register_forward_hook(hook, with_kwargs=True)


def _rope(hf_config: object) -> dict[str, Any]:
    found = getattr(hf_config, "rope_parameters", None) or {}
    return {"rope_type": "default", "rope_theta": getattr(hf_config, "rope_theta", 10000.0), **found}


def check_rope(hf_config: object) -> None:
    """Refuse a position embedding that the layers do not do.

    Raises:
        ConfigError: Says which backend does it.
    """
    _frequencies(hf_config)


def _frequencies(hf_config: Any) -> Tensor:
    """[D / 2] inverse frequencies as the Hugging Face model has them, its long-context scaling included."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = _rope(hf_config)["rope_type"]
    if kind == "default":
        size = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
        theta: float = _rope(hf_config)["rope_theta"]
        exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
        frequencies: Tensor = 1.0 / (theta**exponents)
        return frequencies
    if kind in ("linear", "llama3"):
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
        if scale == 1.0:
            return frequencies
    raise ConfigError(
        f"The megatron backend does not do rotary embeddings of type {kind!r} (it does default, linear and llama3). "
        "Set policy.backend: dtensor."
    )
