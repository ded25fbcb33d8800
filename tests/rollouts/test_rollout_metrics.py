from __future__ import annotations

import pytest

from nemo_rl_core.records.rollout import Rollout, RolloutError, RolloutGroup, Turn
from nemo_rl_core.rollouts.metrics import failure_summary, rollout_metrics


def rollout(index, reward, *, tokens=2, turns=1, error=None, truncated=False, info=None, segments=1, text="a"):
    turn = Turn(
        message={"role": "assistant", "content": text}, token_ids=[1] * tokens, sampled=True, logprobs=[0.0] * tokens
    )
    prompt = Turn(message={"role": "user", "content": "q"}, token_ids=[5, 5], sampled=False)
    return Rollout(
        rollout_id=f"t/{index}",
        task_id="t",
        index=index,
        seed=0,
        segments=[[prompt] + [turn] * turns for _ in range(segments)],
        rewards={} if error else reward if isinstance(reward, dict) else {"reward": reward},
        terminated=not truncated,
        truncated=truncated,
        error=RolloutError(stage=error, type="E", message="went wrong") if error else None,
        info=info or {},
        timing_s={"total": float(index + 1)},
    )


def group(group_id, *rollouts):
    return RolloutGroup(group_id=group_id, task_id=str(group_id), rollouts=list(rollouts))


def test_values_worked_by_hand():
    groups = [
        group(0, rollout(0, 1.0, tokens=2), rollout(1, 0.0, tokens=4, truncated=True, info={"steps": 3, "name": "x"})),
        group(1, rollout(0, 1.0, tokens=6, turns=1, info={"steps": 5}), rollout(1, 1.0, segments=2, text=" ")),
        group(2, rollout(0, 0.0), rollout(1, 9.0, error="score")),
    ]
    metrics = rollout_metrics(groups)
    expected = {
        "reward/mean": 0.6,
        "reward/std": 0.24**0.5,
        "reward/min": 0.0,
        "reward/max": 1.0,
        "reward/reward/mean": 0.6,
        "rollouts/num": 6,
        "rollouts/num_groups": 3,
        "rollouts/failed_fraction": 1 / 6,
        "rollouts/failed_score": 1,
        "rollouts/response_tokens_mean": (2 + 4 + 6 + 4 + 2) / 5,
        "rollouts/response_tokens_min": 2,
        "rollouts/response_tokens_max": 6,
        "rollouts/turns_mean": 6 / 5,
        "rollouts/truncated_fraction": 0.2,
        "rollouts/terminated_fraction": 0.8,
        "rollouts/empty_fraction": 0.2,
        "rollouts/forks": 1,
        "rollouts/zero_variance_fraction": 2 / 3,
        "rollouts/all_max_fraction": 1 / 3,
        "rollouts/all_min_fraction": 1 / 3,
        "env/steps": 4.0,
        "timing/rollout_total_mean_s": 1.5,
        "timing/rollout_total_max_s": 2.0,
    }
    assert metrics == pytest.approx(expected)


@pytest.mark.parametrize(("reward", "all_max", "all_min"), [(1.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_a_step_without_any_variance_is_told_apart_by_sign(reward, all_max, all_min):
    metrics = rollout_metrics([group(i, rollout(0, reward), rollout(1, reward)) for i in range(3)])
    assert metrics["rollouts/zero_variance_fraction"] == 1.0
    assert (metrics["rollouts/all_max_fraction"], metrics["rollouts/all_min_fraction"]) == (all_max, all_min)


def test_named_rewards_have_their_own_means():
    metrics = rollout_metrics([group(0, rollout(0, {"a": 1.0, "b": 3.0}), rollout(1, {"a": 0.0}))])
    assert (metrics["reward/a/mean"], metrics["reward/b/mean"], metrics["reward/mean"]) == (0.5, 3.0, 2.0)


def test_nothing_valid_and_nothing_at_all():
    metrics = rollout_metrics([group(0, rollout(0, 0, error="reset"), rollout(1, 0, error="generate"))])
    assert metrics["rollouts/failed_fraction"] == 1.0 and "reward/mean" not in metrics
    assert metrics["rollouts/failed_reset"] == metrics["rollouts/failed_generate"] == 1.0
    assert rollout_metrics([])["rollouts/num"] == 0.0


def test_the_summary_counts_equal_errors():
    groups = [group(i, rollout(0, 0, error="score"), rollout(1, 0, error="score" if i else "reset")) for i in range(2)]
    assert failure_summary(groups) == "3 x score: E: went wrong\n1 x reset: E: went wrong"
    assert failure_summary([group(0, rollout(0, 1.0))]) == ""
