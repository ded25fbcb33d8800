"""Conversion of recorded rollouts to a training batch.

Legend: B sequences, N tokens in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch

from nemo_rl_core.errors import DataError
from nemo_rl_core.records.batch import BatchedDataDict

if TYPE_CHECKING:
    from nemo_rl_core.records.rollout import Rollout, RolloutGroup, Turn

__all__ = ["batch_from_groups"]


def batch_from_groups(groups: Sequence[RolloutGroup]) -> BatchedDataDict:
    """Build the training batch of whole groups, in order.

    Rollouts that failed are left out. Each segment of a rollout is a sequence: a rollout whose history
    was rewritten gives several, with the same reward, group and index, so that (`group_ids`,
    `rollout_index`) names the rollout and an estimator can count it once. A rollout with nothing sampled
    (an empty completion) stays: it trains no token, and its reward counts in its group.

    Returns:
        Per token [N]: `input_ids` int64, `loss_mask` bool (True exactly on sampled tokens),
        `rollout_logprobs` float32 (0 where not sampled). Per sequence [B]: `rewards` float32, `group_ids`,
        `rollout_index`, `weight_version` (the oldest that sampled the rollout), `num_turns` (of the policy,
        in the whole rollout) int64, `truncated` bool, and `reward/<name>` float32 for each named reward
        (0 where a rollout does not have the name).

    Raises:
        DataError: A rollout has no tokens, as one read from a record without token ids.
    """
    rollouts = [(group, rollout) for group in groups for rollout in group.valid]
    _require_tokens(rollout for _, rollout in rollouts)
    segments = [segment for _, rollout in rollouts for segment in rollout.segments]
    owner = [i for i, (_, rollout) in enumerate(rollouts) for _ in rollout.segments]
    lengths = [sum(len(turn.token_ids) for turn in segment) for segment in segments]
    input_ids, loss_mask, logprobs = _streams([turn for segment in segments for turn in segment])
    batch = BatchedDataDict(
        lengths,
        {"input_ids": input_ids, "loss_mask": loss_mask, "rollout_logprobs": logprobs},
    )
    rows = torch.tensor(owner, dtype=torch.int64)
    for name, value in _per_rollout(rollouts).items():
        batch.set_sequences(name, value[rows])
    return batch


def _require_tokens(rollouts: Iterable[Rollout]) -> None:
    for rollout in rollouts:
        if not rollout.segments or not all(any(t.token_ids for t in segment) for segment in rollout.segments):
            raise DataError(
                f"Rollout {rollout.rollout_id!r} has no token ids, so it cannot be trained on. "
                "Records made by other tools need `prompt_token_ids` and `generation_token_ids`."
            )


def _streams(turns: Sequence[Turn]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N] tokens, mask and logprobs of all turns, one after another."""
    sizes = np.fromiter((len(turn.token_ids) for turn in turns), dtype=np.int64, count=len(turns))
    total = int(sizes.sum())
    sampled = np.fromiter((turn.sampled for turn in turns), dtype=np.bool_, count=len(turns))
    ids = np.fromiter(chain.from_iterable(turn.token_ids for turn in turns), dtype=np.int64, count=total)
    mask = np.repeat(sampled, sizes)
    trained = [turn for turn in turns if turn.sampled]
    for turn in trained:
        if len(turn.logprobs) != len(turn.token_ids):
            raise DataError(
                f"A sampled turn has {len(turn.token_ids)} tokens and {len(turn.logprobs)} logprobs; "
                "it needs one for each token."
            )
    logprobs = np.zeros(total, dtype=np.float32)
    logprobs[mask] = np.fromiter(
        chain.from_iterable(turn.logprobs for turn in trained), dtype=np.float32, count=int(mask.sum())
    )
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(logprobs)


def _per_rollout(rollouts: Sequence[tuple[RolloutGroup, Rollout]]) -> dict[str, torch.Tensor]:
    """Fields by name, [R] each: one value for each of the R rollouts."""
    fields = {
        "rewards": torch.tensor([r.reward for _, r in rollouts], dtype=torch.float32),
        "group_ids": torch.tensor([g.group_id for g, _ in rollouts], dtype=torch.int64),
        "rollout_index": torch.tensor([r.index for _, r in rollouts], dtype=torch.int64),
        "weight_version": torch.tensor([_oldest(g, r) for g, r in rollouts], dtype=torch.int64),
        "num_turns": torch.tensor([_num_turns(r) for _, r in rollouts], dtype=torch.int64),
        "truncated": torch.tensor([r.truncated for _, r in rollouts], dtype=torch.bool),
    }
    for name in sorted({name for _, r in rollouts for name in r.rewards}):
        values = [r.rewards.get(name, 0.0) for _, r in rollouts]
        fields[f"reward/{name}"] = torch.tensor(values, dtype=torch.float32)
    return fields


def _oldest(group: RolloutGroup, rollout: Rollout) -> int:
    version = rollout.oldest_weight_version
    return group.weight_version if version is None else version


def _num_turns(rollout: Rollout) -> int:
    return sum(turn.sampled for segment in rollout.segments for turn in segment)
