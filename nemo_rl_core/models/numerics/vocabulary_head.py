"""Outputs of a language model's head that a loss may need, computed from hidden states.

Legend: M tokens whose outputs are wanted, E hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models.numerics.logprobs import LogitTransform, VocabularyShard, likeliest, linear_logprobs

__all__ = ["VOCABULARY_OUTPUTS", "check_ids", "differentiable_logits", "vocabulary_outputs"]

VOCABULARY_OUTPUTS = frozenset({"logprobs", "entropy", "logits", "top_logprobs"})
"""Fields of `ModelOutputs` that a vocabulary gives."""


def vocabulary_outputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    needs: frozenset[str],
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
    chunk_size: int = 1024,
    top_ids: Tensor | None = None,
    top_k: int = 0,
    shard: VocabularyShard | None = None,
) -> dict[str, Tensor]:
    """Logprobs, entropies and logprobs of other tokens, without an [M, V] matrix; see `linear_logprobs`.

    Args:
        hidden: [M, E] hidden states that predict.
        weight: [V, E] output layer, or this rank's rows of it.
        targets: [M] int64 predicted tokens.
        needs: Of `VOCABULARY_OUTPUTS` without "logits".
        bias: [V] of the output layer.
        transform: See `LogitTransform`.
        chunk_size: Tokens whose logits are held at a time.
        top_ids: [M, ...] other tokens in place of each, whose `top_logprobs` are wanted.
        top_k: Also give the `top_ids` and `top_logprobs` [M, top_k] of the likeliest tokens, without gradient.
        shard: See `VocabularyShard`.

    Returns:
        A tensor [M] (top_logprobs: in the shape of `top_ids`) by name.
    """
    out: dict[str, Tensor] = {}
    if needs & {"logprobs", "entropy", "top_logprobs"}:
        with_top = "top_logprobs" in needs and top_ids is not None
        logprobs, entropy = linear_logprobs(
            hidden,
            weight,
            torch.cat([targets[:, None], top_ids.flatten(1)], dim=1) if with_top and top_ids is not None else targets,
            bias=bias,
            transform=transform,
            chunk_size=chunk_size,
            with_entropy="entropy" in needs,
            shard=shard,
        )
        if with_top and top_ids is not None:
            out["top_logprobs"] = logprobs[:, 1:].reshape(top_ids.shape)
            logprobs = logprobs[:, 0]
        out["logprobs"] = logprobs
        if entropy is not None:
            out["entropy"] = entropy
    if top_k:
        found = likeliest(hidden, weight, top_k, bias=bias, transform=transform, chunk_size=chunk_size, shard=shard)
        out["top_ids"], out["top_logprobs"] = found
    return out


def differentiable_logits(transform: LogitTransform, logits: Tensor) -> Tensor:
    """[..., V] to [..., V]: the transform out of place, for a loss that wants the logits themselves."""
    logits = logits * transform.scale
    if transform.softcap is not None:
        logits = torch.tanh(logits / transform.softcap) * transform.softcap
    return logits / transform.temperature


def check_ids(ids: Tensor, num_ids: int) -> None:
    """Refuse `top_ids` [N, ...] of another vocabulary.

    Raises:
        ConfigError: An id is not below `num_ids`.
    """
    if ids.numel() and int(ids.max()) >= num_ids:
        raise ConfigError(
            f"batch['top_ids'] has the token id {int(ids.max())}, but this model's vocabulary has {num_ids}. The ids "
            "come from a model with another vocabulary; choose one with the same tokenizer."
        )
