"""Any causal language model at all, without a cache: each step runs over all tokens again.

Slow, and right for models whose state is not keys and values (recurrent and hybrid layers, alibi).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_rl_plugins_torch_engine.cache import KVCache, LayerShape
from nemo_rl_plugins_torch_engine.passes import DecodePass, PrefillPass

if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["RecomputeDecoder"]


class RecomputeDecoder:
    """Runs the Hugging Face module on whole sequences, right-padded.

    Its "cache" is a `KVCache` of one layer that holds token ids, so that rows are moved and shared like
    those of any decoder. A causal model gives the same logits whatever pads the right side.
    """

    def __init__(self, model: PreTrainedModel, *, num_rows: int, max_length: int) -> None:
        self.model = model
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        device = next(model.parameters()).device
        self.cache = KVCache(
            [LayerShape(1, 1, 0)], num_rows=num_rows, max_length=max_length, dtype=torch.int64, device=device
        )

    def prefill(self, batch: PrefillPass) -> Tensor:
        """Return logits [num_prompts, V], see `Decoder.prefill`."""
        self.cache.keys[0][batch.rows, 0, batch.row_positions, 0] = batch.token_ids[batch.source]
        logits = []
        for run in batch.runs:
            span = slice(run.start, run.start + run.count * run.length)
            tokens = batch.token_ids[span].view(run.count, run.length)
            logits.append(self._logits(tokens)[:, -1])
        return torch.cat(logits)

    def decode(self, batch: DecodePass) -> Tensor:
        """Return logits [R, V], see `Decoder.decode`."""
        count = batch.rows.shape[0]
        self.cache.keys[0][batch.rows, 0, batch.positions, 0] = batch.token_ids
        tokens = self.cache.keys[0][:count, 0, : batch.length, 0]
        return self._logits(tokens)[batch.rows, batch.positions]

    def refresh(self) -> int:
        """Nothing is derived from the weights."""
        return 0

    def _logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits
