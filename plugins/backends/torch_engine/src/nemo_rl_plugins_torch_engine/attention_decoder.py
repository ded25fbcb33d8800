"""Any Hugging Face model whose attention can be replaced, run over our cache.

The model's own forward is used; its attention function is ours (registered with transformers'
`AttentionInterface`), which writes and reads the cache. The model builds no mask and no cache of its own.
"""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_rl_plugins_torch_engine.attention import attend_cache, attend_packed, length_mask
from nemo_rl_plugins_torch_engine.cache import KVCache, LayerShape
from nemo_rl_plugins_torch_engine.passes import DecodePass, PrefillPass, Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["ATTENTION_NAME", "AttentionDecoder", "UnsupportedModel", "register_attention"]

ATTENTION_NAME = "nemo_rl_torch_engine"

_ALLOWED_LAYERS = frozenset({"full_attention", "sliding_attention"})
_active = threading.local()


class UnsupportedModel(Exception):
    """The model cannot be run this way; the message says why."""


def register_attention() -> None:
    """Make our attention function known to transformers (may be called again)."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _attention)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention function as transformers calls it: query [1, H, N, D] packed, or [B, H, 1, D]."""
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedModel(f"its attention takes {name!r}")
    if attention_mask is not None:
        raise UnsupportedModel("it builds an attention mask of its own")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    step: _Step = _active.step
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedModel("its attention modules have no layer_idx")
    return step.attend(layer, query, key, value, scale, sliding_window, softcap), None


class _Step:
    """What the attention function does in the present pass."""

    def __init__(self, cache: KVCache | None, batch: PrefillPass | DecodePass) -> None:
        self.cache = cache
        self.batch = batch
        self.shapes: dict[int, LayerShape] = {}
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attend with queries [1, H, T, E], or [R, H, 1, E] to decode; gives [1, T, H, E] or [R, 1, H, E]."""
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])
        if isinstance(self.batch, PrefillPass):
            return self._prefill(self.batch, layer, query, key, value, scale, window, softcap)
        return self._decode(self.batch, layer, query, key, value, scale, window, softcap)

    def _prefill(
        self, batch: PrefillPass, layer: int, query: Tensor, key: Tensor, value: Tensor,
        scale: float, window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Attend over packed prompts, q, k and v [1, H, T, E], and write keys and values to the cache."""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if self.cache is not None:
            self.cache.keys[layer][batch.rows, :, batch.row_positions] = k[batch.source].to(self.cache.dtype)
            self.cache.values[layer][batch.rows, :, batch.row_positions] = v[batch.source].to(self.cache.dtype)
        return attend_packed(q, k, v, batch.runs, scale=scale, window=window, softcap=softcap)[None]

    def _decode(
        self, batch: DecodePass, layer: int, query: Tensor, key: Tensor, value: Tensor,
        scale: float, window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Attend with one new token per row, q, k and v [R, H, 1, E], to what the cache holds of its row."""
        assert self.cache is not None
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[batch.rows, :, batch.positions] = key[:, :, 0].to(keys.dtype)
        values[batch.rows, :, batch.positions] = value[:, :, 0].to(values.dtype)
        count, length = batch.rows.shape[0], batch.length
        if window not in self._masks:
            self._masks[window] = length_mask(batch.positions, length, query.dtype, window)
        out = attend_cache(
            query[:, :, 0],
            keys[:count, :, :length],
            values[:count, :, :length],
            self._masks[window],
            scale=scale,
            softcap=softcap,
        )
        return out[:, None]


class AttentionDecoder:
    """A Hugging Face causal language model with our attention over our cache.

    Raises:
        UnsupportedModel: The model's attention cannot be replaced, or replacing it changes its logits.
    """

    def __init__(self, model: PreTrainedModel, *, num_rows: int, max_length: int, cache_dtype: torch.dtype) -> None:
        self.model = model
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        self._keep_argument = "logits_to_keep" in inspect.signature(model.forward).parameters
        _refuse_by_config(model)
        self.cache = _probe(self, num_rows, max_length, cache_dtype)

    def prefill(self, batch: PrefillPass) -> Tensor:
        """Return logits [num_prompts, V], see `Decoder.prefill`."""
        logits = self._forward(_Step(self.cache, batch), batch.token_ids[None], batch.positions[None], batch.last)
        return logits[0]

    def decode(self, batch: DecodePass) -> Tensor:
        """Return logits [R, V], see `Decoder.decode`."""
        step = _Step(self.cache, batch)
        return self._forward(step, batch.token_ids[:, None], batch.positions[:, None], None)[:, 0]

    def refresh(self) -> int:
        """Nothing is derived from the weights."""
        return 0

    def _forward(self, step: _Step, token_ids: Tensor, positions: Tensor, last: Tensor | None) -> Tensor:
        """Run the model on ids and positions [B, T]; returns logits [B, T, V], of the tokens in `last` [P] only."""
        keep = {"logits_to_keep": last} if self._keep_argument and last is not None else {}
        _active.step = step
        try:
            out = self.model(input_ids=token_ids, position_ids=positions, use_cache=False, **keep)
        finally:
            del _active.step
        logits: Tensor = out.logits
        return logits if keep or last is None else logits[:, last]


def _refuse_by_config(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or ()) - _ALLOWED_LAYERS
    if unknown:
        raise UnsupportedModel(f"it has layers of type {sorted(unknown)}")
    if getattr(config, "attention_chunk_size", None):
        raise UnsupportedModel("it attends in chunks")
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel("its attention function cannot be replaced")


def _probe(decoder: AttentionDecoder, num_rows: int, max_length: int, dtype: torch.dtype) -> KVCache:
    """Learn the cache's shapes by a short forward, and compare prefill and decoding with the model itself."""
    model = decoder.model
    device = next(model.parameters()).device
    count = min(8, max_length - 1)
    tokens = torch.arange(1, count + 1, device=device) % decoder.vocab_size
    at = torch.arange(count, device=device)
    with torch.no_grad():
        reference = model(input_ids=tokens[None], use_cache=False).logits[0].float()
        model.set_attn_implementation(ATTENTION_NAME)
        everything = PrefillPass(tokens, at, at, (Run(0, 1, count),), at[:0], at[:0], at[:0])
        step = _Step(None, everything)
        logits = decoder._forward(step, tokens[None], at[None], at)[0].float()
        num_layers = model.config.get_text_config().num_hidden_layers
        if sorted(step.shapes) != list(range(num_layers)):
            raise UnsupportedModel(f"our attention was called for layers {sorted(step.shapes)} of {num_layers}")
        _compare(logits, reference, "prefill")
        shapes = [step.shapes[i] for i in range(num_layers)]
        cache = KVCache(shapes, num_rows=num_rows, max_length=max_length, dtype=dtype, device=device)
        decoder.cache = cache
        ids = tokens.tolist()
        decoder.prefill(PrefillPass.of([ids[:-1]], [[0]], device))
        last = decoder.decode(DecodePass(tokens[-1:], at[-1:], at[:1], count))
        _compare(last.float(), reference[-1:], "decoding")
    return cache


def _compare(ours: Tensor, theirs: Tensor, what: str) -> None:
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
    if not error < 0.05:
        raise UnsupportedModel(f"its logits change by {error:.0%} in {what} with our attention")
