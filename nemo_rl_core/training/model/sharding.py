"""Data-parallel shards of one optimizer step: balanced by tokens, equally many micro-batches each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import frozen

from nemo_rl_core.training.model.packing import lightest_first, micro_batches_by_tokens

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ShardPlan", "plan_step"]


@frozen(kw_only=True)
class ShardPlan:
    """Part of one data-parallel rank in one optimizer step."""

    indices: list[int]
    """Ascending positions into the global batch: `batch.select(plan.indices)` is the rank's batch."""
    micro_batches: list[list[int]]
    """Positions into the *rank's* batch, as `StepPlan.micro_batches` takes them; some may be empty."""


def plan_step(
    lengths: Sequence[int] | Tensor,
    *,
    num_shards: int = 1,
    token_budget: int,
    group_ids: Sequence[int] | Tensor | None = None,
) -> list[ShardPlan]:
    """Shard a global batch over data-parallel ranks and cut each shard into micro-batches.

    Shards are balanced by tokens, not by sequences: two differ by at most the longest sequence. All get
    the same number of micro-batches (the need of the neediest), because ranks meet in a collective at
    each. Every sequence is in exactly one micro-batch of one shard. Deterministic.

    Args:
        lengths: [B] tokens of each sequence of the global batch (a list or an int64 tensor).
        num_shards: Data-parallel size, >= 1.
        token_budget: Tokens of one micro-batch; a longer sequence goes alone.
        group_ids: [B] keeps the sequences of equal id together in one micro-batch; None lets each go its own way.

    Returns:
        One plan per shard, in order of shard.
    """
    if num_shards < 1:
        raise ValueError(f"num_shards={num_shards} must be >= 1.")
    sizes = _integers(lengths)
    if group_ids is not None:
        return _plan_groups(sizes, _integers(group_ids), num_shards, token_budget)
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    shards = [sorted(shard) for shard in lightest_first(sizes, order, num_shards)]
    shard_sizes = [[sizes[i] for i in shard] for shard in shards]
    cuts = [micro_batches_by_tokens(s, token_budget) for s in shard_sizes]
    most = max(len(cut) for cut in cuts)
    return [
        ShardPlan(
            indices=shard,
            micro_batches=cut if len(cut) == most else micro_batches_by_tokens(s, token_budget, min_bins=most),
        )
        for shard, s, cut in zip(shards, shard_sizes, cuts, strict=True)
    ]


def _plan_groups(sizes: list[int], group_ids: list[int], num_shards: int, token_budget: int) -> list[ShardPlan]:
    """Plan with whole groups in place of sequences, then name their members."""
    members: dict[int, list[int]] = {}
    for position, group in enumerate(group_ids):
        members.setdefault(group, []).append(position)
    groups = list(members.values())
    plans = plan_step([sum(sizes[i] for i in g) for g in groups], num_shards=num_shards, token_budget=token_budget)
    made = []
    for plan in plans:
        chosen = [groups[i] for i in plan.indices]
        indices = sorted(i for group in chosen for i in group)
        place = {position: rank for rank, position in enumerate(indices)}
        cuts = [[place[i] for number in cut for i in chosen[number]] for cut in plan.micro_batches]
        made.append(ShardPlan(indices=indices, micro_batches=cuts))
    return made


def _integers(values: Sequence[int] | Tensor) -> list[int]:
    return [int(x) for x in (values.tolist() if hasattr(values, "tolist") else values)]
