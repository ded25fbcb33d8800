from __future__ import annotations

import pytest
import torch

from nemo_rl_core.errors import DataError
from nemo_rl_core.records.rollout import Rollout, RolloutError, RolloutGroup, Turn
from nemo_rl_core.records.to_batch import batch_from_groups


def turn(token_ids, sampled=False, version=None, logprobs=None):
    role = "assistant" if sampled else "user"
    if sampled and logprobs is None:
        logprobs = [-0.5 * (i + 1) for i in range(len(token_ids))]
    return Turn(
        message={"role": role, "content": "x"},
        token_ids=token_ids,
        sampled=sampled,
        logprobs=logprobs or [],
        weight_version=version,
    )


def rollout(index, *segments, rewards=None, **fields):
    return Rollout(
        rollout_id=f"t/{index}",
        task_id="t",
        index=index,
        seed=0,
        segments=list(segments),
        rewards=rewards or {},
        **fields,
    )


def group(group_id, *rollouts, version=0):
    return RolloutGroup(group_id=group_id, task_id="t", rollouts=list(rollouts), weight_version=version)


def test_fields_worked_by_hand():
    groups = [
        group(
            4,
            rollout(0, [turn([5, 6]), turn([7, 1], True, 3)], rewards={"a": 1.0, "b": 0.5}),
            rollout(1, [turn([]), turn([5, 6]), turn([8], True, 2), turn([9]), turn([1], True, 4)], truncated=True),
        ),
        group(9, rollout(3, [turn([2]), turn([], True)], rewards={"a": -1.0}), version=6),
    ]
    batch = batch_from_groups(groups)
    assert batch.lengths.tolist() == [4, 5, 1]
    assert batch["input_ids"].tolist() == [5, 6, 7, 1, 5, 6, 8, 9, 1, 2]
    assert batch["loss_mask"].tolist() == [False, False, True, True, False, False, True, False, True, False]
    assert batch["rollout_logprobs"].tolist() == [0, 0, -0.5, -1.0, 0, 0, -0.5, 0, -0.5, 0]
    assert batch["rewards"].tolist() == [1.5, 0.0, -1.0]
    assert batch["reward/a"].tolist() == [1.0, 0.0, -1.0] and batch["reward/b"].tolist() == [0.5, 0.0, 0.0]
    assert batch["group_ids"].tolist() == [4, 4, 9]
    assert batch["rollout_index"].tolist() == [0, 1, 3]
    assert batch["weight_version"].tolist() == [3, 2, 6]
    assert batch["num_turns"].tolist() == [1, 2, 1]
    assert batch["truncated"].tolist() == [False, True, False]
    kinds = {name: batch[name].dtype for name in ("input_ids", "loss_mask", "rollout_logprobs", "rewards")}
    assert kinds == {
        "input_ids": torch.int64,
        "loss_mask": torch.bool,
        "rollout_logprobs": torch.float32,
        "rewards": torch.float32,
    }


def test_failed_rollouts_are_left_out():
    failed = rollout(0, [turn([5]), turn([7], True)], error=RolloutError(stage="score", type="E", message="m"))
    batch = batch_from_groups([group(0, failed, rollout(1, [turn([5]), turn([8], True)]))])
    assert batch["rollout_index"].tolist() == [1] and batch["input_ids"].tolist() == [5, 8]


def test_forked_segments_are_sequences_of_one_rollout():
    forked = rollout(2, [turn([5]), turn([7], True)], [turn([5, 6]), turn([8], True)], rewards={"reward": 1.0})
    batch = batch_from_groups([group(1, forked)])
    assert batch.lengths.tolist() == [2, 3]
    for name, value in (("rollout_index", 2), ("group_ids", 1), ("rewards", 1.0), ("num_turns", 2)):
        assert batch[name].tolist() == [value] * 2


def test_no_groups_or_only_failures_give_an_empty_batch():
    failed = rollout(0, error=RolloutError(stage="reset", type="E", message="m"))
    for groups in ([], [group(0, failed)]):
        batch = batch_from_groups(groups)
        assert len(batch) == 0 and batch.num_tokens == 0 and "rewards" in batch


def test_records_without_tokens_are_refused():
    with pytest.raises(DataError, match="'t/0' has no token ids"):
        batch_from_groups([group(0, rollout(0, [turn([]), turn([], True)]))])


def test_missing_logprobs_are_refused():
    with pytest.raises(DataError, match="2 tokens and 1 logprobs"):
        batch_from_groups([group(0, rollout(0, [turn([5]), turn([7, 8], True, logprobs=[-1.0])]))])
