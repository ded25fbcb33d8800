"""Our own forward for decoders of the Llama shape (Llama, Mistral, Qwen2, Qwen3).

It reads the Hugging Face module's parameters where they lie, so that aliased weights stay aliased (on the CPU
in float32 the linear layers' weights are copied, see `packed`), and calls a fraction of the operators: one
rotation for queries and keys, packed rows, no module calls.

Legend: N tokens of a pass, H query heads, K kv heads, D head size, T positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import embedding, rms_norm, silu

from nemo_rl_plugins_torch_engine.attention import attend_cache, attend_packed, length_mask
from nemo_rl_plugins_torch_engine.attention_decoder import UnsupportedModel
from nemo_rl_plugins_torch_engine.cache import KVCache, LayerShape
from nemo_rl_plugins_torch_engine.packed import Linear, Packing
from nemo_rl_plugins_torch_engine.passes import DecodePass, PrefillPass

if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["LeanDecoder"]

_CLASSES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
_FIXED_ROPE = frozenset({"default", "linear", "llama3", "yarn"})


@frozen(eq=False)
class _Layer:
    """The parameters of one layer, taken out of the module once: attribute access through it is slow."""

    input_norm: Tensor
    query_key_value: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    scale: float

    @classmethod
    def of(cls, layer: Any, packing: Packing) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            input_norm=layer.input_layernorm.weight,
            query_key_value=packing.linear(attention.q_proj, attention.k_proj, attention.v_proj),
            query_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
            key_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
            output=packing.linear(attention.o_proj),
            mlp_norm=layer.post_attention_layernorm.weight,
            gate_up=packing.linear(mlp.gate_proj, mlp.up_proj),
            down=packing.linear(mlp.down_proj),
            scale=attention.scaling,
        )


class LeanDecoder:
    """A Llama-shaped model over our cache.

    Raises:
        UnsupportedModel: The model is of another shape.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_rows: int,
        max_length: int,
        cache_dtype: torch.dtype,
        packed_weights: bool = True,
    ) -> None:
        config = model.config
        _refuse_by_config(model)
        self._model = model
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._head_size = model.model.layers[0].self_attn.head_dim
        self._eps = config.rms_norm_eps
        weight = model.model.embed_tokens.weight
        shape = LayerShape(self._kv_heads, self._head_size, self._head_size)
        self.cache = KVCache(
            [shape] * config.num_hidden_layers,
            num_rows=num_rows,
            max_length=max_length,
            dtype=cache_dtype,
            device=weight.device,
        )
        with torch.no_grad():
            cos, sin = model.model.rotary_emb(weight, torch.arange(max_length, device=weight.device)[None])
        # rotate_half(x) * sin = roll(x, D/2) * signed sin
        half = self._head_size // 2
        self._cos = cos[0, :, None].to(weight.dtype)
        self._sin = torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], dim=-1).to(weight.dtype)
        self._packing = Packing(enabled=packed_weights, max_rows=num_rows)
        self.refresh()

    def refresh(self) -> int:
        """Take the module's parameters again; the bytes that were copied for it."""
        model, before = self._model, self._packing.num_bytes
        self._layers: list[_Layer] = []  # the old copies' memory serves the new ones
        self._layers += [_Layer.of(layer, self._packing) for layer in model.model.layers]
        self._embedding = model.model.embed_tokens.weight
        self._final_norm = model.model.norm.weight
        self._head = self._packing.linear(model.lm_head)
        return self._packing.num_bytes - before

    def prefill(self, batch: PrefillPass) -> Tensor:
        """Return logits [num_prompts, V], see `Decoder.prefill`."""
        hidden = self._run(batch.token_ids, batch.positions, batch)
        return self._logits(hidden[batch.last])

    def decode(self, batch: DecodePass) -> Tensor:
        """Return logits [R, V], see `Decoder.decode`."""
        return self._logits(self._run(batch.token_ids, batch.positions, batch))

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._head(self._norm(hidden, self._final_norm))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, (x.shape[-1],), weight, self._eps)

    def _run(self, token_ids: Tensor, positions: Tensor, batch: PrefillPass | DecodePass) -> Tensor:
        """Return hidden states [T, E] of token ids and positions [T]."""
        hidden = embedding(token_ids, self._embedding)
        cos, sin = self._cos[positions], self._sin[positions]
        mask = None
        if isinstance(batch, DecodePass):
            mask = length_mask(positions, batch.length, hidden.dtype)
        for index, layer in enumerate(self._layers):
            x = self._norm(hidden, layer.input_norm)
            hidden = hidden + layer.output(self._attend(index, layer, x, cos, sin, batch, mask))
            x = self._norm(hidden, layer.mlp_norm)
            gate, up = layer.gate_up.split(x)
            gate = silu(gate)
            gate *= up
            hidden += layer.down(gate)
        return hidden

    def _attend(
        self, index: int, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor,
        batch: PrefillPass | DecodePass, mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attend in one layer with normed hidden states x [T, E]; returns [T, H * head_size]."""
        size, heads = self._head_size, self._heads
        projected = layer.query_key_value(x).view(x.shape[0], -1, size)
        both, value = projected.split_with_sizes([heads + self._kv_heads, self._kv_heads], dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = self._norm(both[:, :heads], layer.query_norm), self._norm(both[:, heads:], layer.key_norm)
            both = torch.cat([query, key], dim=1)
        both = torch.addcmul(both * cos, both.roll(size // 2, -1), sin)
        query, key = both[:, :heads], both[:, heads:]
        keys, values = self.cache.keys[index], self.cache.values[index]
        if isinstance(batch, PrefillPass):
            keys[batch.rows, :, batch.row_positions] = key[batch.source].to(keys.dtype)
            values[batch.rows, :, batch.row_positions] = value[batch.source].to(values.dtype)
            out = attend_packed(query, key, value, batch.runs, scale=layer.scale)
        else:
            assert mask is not None
            keys[batch.rows, :, batch.positions] = key.to(keys.dtype)
            values[batch.rows, :, batch.positions] = value.to(values.dtype)
            count, length = batch.rows.shape[0], batch.length
            out = attend_cache(query, keys[:count, :, :length], values[:count, :, :length], mask, scale=layer.scale)
        return out.flatten(1)


def _refuse_by_config(model: PreTrainedModel) -> None:
    config = model.config
    if type(model).__name__ not in _CLASSES:
        raise UnsupportedModel(f"{type(model).__name__} is not one of {sorted(_CLASSES)}")
    if config.hidden_act != "silu":
        raise UnsupportedModel(f"its activation is {config.hidden_act!r}")
    if model.model.rotary_emb.rope_type not in _FIXED_ROPE:
        raise UnsupportedModel(f"its rotary embedding of type {model.model.rotary_emb.rope_type!r} changes with length")
    if any(getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers):
        raise UnsupportedModel("it has a sliding window")
    if getattr(config, "sliding_window", None) and type(model).__name__ == "MistralForCausalLM":
        raise UnsupportedModel("it has a sliding window")
