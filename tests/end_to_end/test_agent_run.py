"""GRPO with an agent that asks the policy over HTTP: it learns, from the tokens that the engine sampled."""

from __future__ import annotations

import sys
from pathlib import Path

import nemo_rl
from nemo_rl_core.records.jsonl import read_groups

EXAMPLES = Path(__file__).parents[2] / "examples" / "agents"


def test_a_tool_using_agent_learns_from_what_the_engine_sampled(tiny, rows, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import calculator_agent

    config = tiny(
        max_steps=14,
        learning_rate=1e-2,
        policy={"max_sequence_length": 64},
        data={"chat_template": calculator_agent.TEMPLATE},
        rollouts={"max_turns": 2},
        environment={"name": "agent", "options": {"agent": "calculator_agent:calculator"}},
    )
    result = nemo_rl.GRPOTrainer(config).fit(rows)
    sys.modules.pop("calculator_agent")
    rewards = [entry["reward/mean"] for entry in result.history]
    assert result.status == "completed"
    assert sum(rewards[-4:]) > sum(rewards[:4]) + 0.4, rewards
    # The trainer's logprobs of the recorded tokens are those that the engine drew them with.
    assert all(abs(entry["train/token_mult_prob_error"] - 1) < 1e-4 for entry in result.history)
    groups = read_groups(tmp_path / "run" / "rollouts" / "step_1.jsonl")
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        (segment,) = rollout.segments
        assert [turn.sampled for turn in segment] == [False, True, False, True]
        assert all(len(turn.token_ids) == len(turn.logprobs) > 0 for turn in segment if turn.sampled)
