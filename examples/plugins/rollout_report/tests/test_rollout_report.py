from __future__ import annotations

import pytest
from rollout_report import report
from typer import BadParameter

from nemo_rl_core.records.jsonl import write_groups
from nemo_rl_core.records.rollout import Rollout, RolloutError, RolloutGroup, Turn


def rollout(index: int, reward: float, **changes) -> Rollout:
    turns = [
        Turn(message={"role": "user", "content": "1+1="}, token_ids=[1], sampled=False),
        Turn(message={"role": "assistant", "content": f"answer {index}"}, token_ids=[2], sampled=True, logprobs=[-1.0]),
    ]
    fields = {"rollout_id": f"t/{index}", "task_id": "t", "index": index, "seed": 0, "segments": [turns]}
    return Rollout(**{**fields, "rewards": {"r": reward}, **changes})


@pytest.fixture
def run(tmp_path):
    error = RolloutError(stage="step", type="ValueError", message="x")
    last = [rollout(0, 0.5), rollout(1, 2.0), rollout(2, -1.0), rollout(3, 0.0, error=error)]
    write_groups(tmp_path / "rollouts" / "step_2.jsonl", [RolloutGroup(group_id=0, task_id="t")])
    write_groups(tmp_path / "rollouts" / "step_10.jsonl", [RolloutGroup(group_id=0, task_id="t", rollouts=last)])
    return tmp_path


def test_the_last_step_by_number(run, capsys):
    report(run, top=1)
    first, best, worst = capsys.readouterr().out.splitlines()
    assert first == "3 rollouts of 1 prompts, 1 failed"
    assert best.split()[:2] == ["best", "2.000"] and "answer 1" in best
    assert worst.split()[:2] == ["worst", "-1.000"] and "answer 2" in worst


def test_each_rollout_stands_once(run, capsys):
    report(run, top=2)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]] == ["2.000", "0.500", "-1.000"]


def test_a_folder_without_rollouts(tmp_path):
    with pytest.raises(BadParameter, match="no recorded rollouts"):
        report(tmp_path, top=1)
