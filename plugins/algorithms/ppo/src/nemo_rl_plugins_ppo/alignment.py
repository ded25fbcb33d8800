"""Values beside the tokens that they belong to.

A scalar head speaks at token i after it has read token i: what it says there is the value of the state in which token
i + 1 is chosen. In the batch a per-token field at position t belongs to token t, so the `values` of a batch are the
head's output moved one place on: `values[t]` is the value of the state *before* token t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["values_after_last", "values_before"]


def values_before(outputs: Tensor, batch: BatchedDataDict) -> Tensor:
    """The value of the state before each token, differentiable.

    Args:
        outputs: [N] a scalar head's output at each token (`ModelOutputs.values`).
        batch: For the borders of its sequences.

    Returns:
        [N]; 0 at the first token of each sequence, before which the head has read nothing.
    """
    moved = torch.cat([outputs.new_zeros(1), outputs])[:-1]
    return moved.masked_fill(batch.position_ids == 0, 0.0)


def values_after_last(outputs: Tensor, batch: BatchedDataDict) -> Tensor:
    """[B] the value of the state that each sequence ends in, from the head's [N] `outputs`."""
    return outputs[batch.offsets[1:] - 1]
