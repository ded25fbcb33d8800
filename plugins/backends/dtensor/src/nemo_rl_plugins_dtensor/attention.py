"""The packed attention of the core in the form that `transformers` calls."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models.numerics.packed_attention import Packing, attend_packed

__all__ = ["ATTENTION_NAME", "packed_attention"]

ATTENTION_NAME = "nemo_rl_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of one row, in the form `transformers` calls.

    Args:
        module: The attention layer (not used).
        query: [1, H, N, D].
        key: [1, K, N, D].
        value: [1, K, N, D].
        attention_mask: Must be None.
        packing: How the row is made up.
        scaling: Factor on the scores; None is D ** -0.5.
        dropout: Must be 0.
        sliding_window: A query sees this many last positions, its own included; None is all.
        softcap: Must be None; scores cannot be capped here.
        kwargs: What other attention functions want.

    Returns:
        [1, N, H, D], and no attention weights.

    Raises:
        ConfigError: The layer asks for something that this function does not do.
    """
    if attention_mask is not None or dropout or softcap is not None or kwargs.get("s_aux") is not None:
        raise ConfigError(
            f"{type(module).__name__} asks packed attention for a mask, dropout, capped scores or attention sinks, "
            "which it does not do. Set policy.options.attention: padded."
        )
    if packing.record is not None:
        packing.record.append(sliding_window)
    # [N, heads, D]
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return attend_packed(q, k, v, packing, scaling=scaling, sliding_window=sliding_window).unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, packed_attention)
