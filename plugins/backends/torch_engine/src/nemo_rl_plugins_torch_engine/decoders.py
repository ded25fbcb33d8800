"""Choosing how a model is run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from nemo_rl_core.errors import ConfigError
from nemo_rl_plugins_torch_engine.attention_decoder import AttentionDecoder, UnsupportedModel, register_attention
from nemo_rl_plugins_torch_engine.cuda_graphs import BucketedDecoder
from nemo_rl_plugins_torch_engine.lean import LeanDecoder
from nemo_rl_plugins_torch_engine.passes import Decoder
from nemo_rl_plugins_torch_engine.recompute import RecomputeDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["build_decoder"]

logger = logging.getLogger(__name__)


def build_decoder(
    model: PreTrainedModel,
    *,
    choice: str,
    num_rows: int,
    max_length: int,
    cache_dtype: torch.dtype,
    cuda_graphs: bool = False,
    packed_weights: bool = True,
) -> Decoder:
    """The decoder of `choice`, or with "auto" the fastest that fits the model.

    Raises:
        ConfigError: The chosen decoder cannot run this model.
    """
    sizes: dict[str, Any] = {"num_rows": num_rows, "max_length": max_length}
    own_attention = model.config._attn_implementation
    reasons: list[str] = []
    if choice in ("auto", "lean"):
        try:
            lean = LeanDecoder(model, cache_dtype=cache_dtype, packed_weights=packed_weights, **sizes)
            captured = cuda_graphs and lean.cache.device.type == "cuda"
            return BucketedDecoder(lean, capture=True) if captured else lean
        except UnsupportedModel as error:
            reasons.append(f"lean: {error}")
    if choice in ("auto", "attention"):
        try:
            register_attention()
            return AttentionDecoder(model, cache_dtype=cache_dtype, **sizes)
        except UnsupportedModel as error:
            model.set_attn_implementation(own_attention)
            reasons.append(f"attention: {error}")
    if choice in ("auto", "recompute"):
        if reasons:
            logger.warning(
                "%s is generated from without a K/V cache, which is slow (%s).",
                type(model).__name__,
                "; ".join(reasons),
            )
        return RecomputeDecoder(model, **sizes)
    raise ConfigError(
        f'generation.options.decoder: {choice!r} cannot run {type(model).__name__} ({"; ".join(reasons)}). Use "auto".'
    )
