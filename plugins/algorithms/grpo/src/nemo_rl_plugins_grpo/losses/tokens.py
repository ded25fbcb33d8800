"""The fields of a micro-batch that a policy-gradient loss reads, and what each token counts.

Legend: B sequences, N tokens of one micro-batch. Three policies may differ: the *current* one (with
gradient), the one at the *start* of this step's updates (`logprobs`), and the one that *sampled*
(`rollout_logprobs`, of the engine).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor

from nemo_rl_core.protocols.loss import Metric, per_token

if TYPE_CHECKING:
    from nemo_rl_core.protocols.loss import ModelOutputs
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["Tokens", "mean_over_tokens", "read_tokens", "token_scale"]


@frozen(eq=False)
class Tokens:
    """The fields of a micro-batch with every masked position set to 0. All [N]."""

    mask: Tensor
    logprobs: Tensor
    """Of the current policy, with gradient."""
    start_logprobs: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None


def read_tokens(outputs: ModelOutputs, batch: BatchedDataDict, *, reference: bool) -> Tokens:
    """The fields, cleaned of what stands in masked positions.

    Without `logprobs` in the batch, the policy at the start of the step is the current one.

    Args:
        outputs: `logprobs` [N].
        batch: `loss_mask`, `rollout_logprobs`, `advantages`, if present `logprobs`.
        reference: Whether to read `ref_logprobs`.

    Raises:
        ShapeMismatch: `outputs.logprobs` is not [N].
    """
    current, mask = per_token(outputs.logprobs, batch, "outputs.logprobs"), batch["loss_mask"]
    dropped = ~mask
    # Masking comes before any arithmetic: an inf or nan that meets exp() or a product first would
    # still reach the gradient as 0 * inf.
    clean = {name: batch[name].masked_fill(dropped, 0.0) for name in ("rollout_logprobs", "advantages")}
    logprobs = current.masked_fill(dropped, 0.0)
    start = batch["logprobs"].masked_fill(dropped, 0.0) if "logprobs" in batch else logprobs.detach()
    ref = batch["ref_logprobs"].masked_fill(dropped, 0.0) if reference else None
    return Tokens(mask, logprobs, start, clean["rollout_logprobs"], clean["advantages"], ref)


def token_scale(
    mask: Tensor, batch: BatchedDataDict, *, aggregation: str, constant_length: int | None = None
) -> Tensor:
    """[N] what each token's term counts: 0 where masked.

    Args:
        mask: [N] bool, what is trained.
        batch: For the extent of its sequences.
        aggregation: "sequence": 1 / trained tokens of its sequence; "constant": 1 / `constant_length`; else 1.
        constant_length: None is 1.
    """
    scale = mask.to(torch.float32)
    if aggregation == "sequence":
        return scale / batch.expand_to_tokens(batch.sum_per_sequence(scale).clamp(min=1))
    if aggregation == "constant":
        return scale / (constant_length or 1)
    return scale


def mean_over_tokens(values: Tensor, mask: Tensor) -> Metric:
    """The mean over trained tokens; `values` [N] without gradient."""
    return Metric(values.masked_fill(~mask, 0.0).sum(), mask.sum())
