"""Student and teacher as distributions on the tokens that the teacher named.

Legend: M tokens, T teachers, K ids, W = K or K + 1.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from nemo_rl_plugins_distillation.loss_config import Tail

__all__ = ["Pair", "log_rest", "on_support"]

_SMALLEST_REST = 1e-7
"""Mass outside below this is rounding."""


@frozen(eq=False)
class Pair:
    """Log-probabilities of both on the same tokens."""

    student: Tensor
    """[M, T, W] with gradient."""
    teacher: Tensor
    """[M, T, W]"""
    open: bool = False
    """The student's distribution goes on outside of these tokens (tail zero)."""


def on_support(student: Tensor, teacher: Tensor, *, tail: Tail, temperature: float = 1.0) -> Pair:
    """Make the log-probabilities of a few tokens comparable.

    Args:
        student: [M, T, K] natural-log p under the whole vocabulary.
        teacher: [M, T, K] likewise.
        tail: See `DivergenceConfig.tail`.
        temperature: Divides both before they are renormalised, which equals dividing the logits; only with
            "renormalize".
    """
    if tail == "renormalize":
        return Pair(torch.log_softmax(student / temperature, -1), torch.log_softmax(teacher / temperature, -1))
    if tail == "bucket":
        return Pair(torch.cat([student, log_rest(student)], -1), torch.cat([teacher, log_rest(teacher)], -1))
    return Pair(student, torch.log_softmax(teacher, -1), open=True)


def log_rest(logprobs: Tensor) -> Tensor:
    """[..., K] to [..., 1]: log of the mass that these tokens leave, at least 1e-7."""
    inside = torch.logsumexp(logprobs, -1, keepdim=True).clamp(max=-_SMALLEST_REST)
    return torch.log(-torch.expm1(inside))
