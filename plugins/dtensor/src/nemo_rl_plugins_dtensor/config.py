"""Options of the backend (`policy.options`)."""

from __future__ import annotations

from typing import Literal

from attrs import frozen

__all__ = ["DTensorConfig"]


@frozen(kw_only=True)
class DTensorConfig:
    """`policy.options` of the dtensor backend."""

    attention: Literal["auto", "packed", "padded"] = "auto"
    """packed: sequences stand one after another in one row, and no layer sees padding; padded: [B, T] with a mask,
    for models whose attention cannot be replaced; auto: packed wherever it gives what the model itself gives."""
    share_prefixes: bool = True
    """Compute the beginning that sequences of a micro-batch have in common (the prompt of a group) once, where that
    saves at least a tenth of the work; only with packed attention. Probabilities and gradients change by rounding."""
    master_weights: bool = True
    """With precision bfloat16: keep float32 weights, gradients and optimizer state beside the bfloat16 weights that
    compute. False trains in bfloat16 alone: a third of the memory, but updates below 1/256 of a weight are lost."""
