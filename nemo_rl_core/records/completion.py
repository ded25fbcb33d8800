"""Completion of one request, as an engine returns it."""

from __future__ import annotations

from typing import Literal

from attrs import frozen

__all__ = ["Completion", "FinishReason"]

FinishReason = Literal["stop", "length", "abort"]
"""stop: an end token or a stop string; length: max_new_tokens or the context was full; abort: cut off."""


@frozen(kw_only=True)
class Completion:
    """One sampled continuation."""

    request_id: str
    token_ids: list[int]
    """Sampled tokens, the end or stop token included."""
    logprobs: list[float]
    """Natural log of each token's probability under the distribution it was drawn from (after
    temperature, top-k and top-p; with temperature 0, under the untempered distribution)."""
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    """The stop string or token id that ended it."""
    weight_version: int = 0
    """Version of the weights that sampled the first token; a later one is in `last_weight_version`."""
    last_weight_version: int = 0
    text: str | None = None
    """Decoded text without special tokens if the engine has it; the rollout engine decodes otherwise."""
