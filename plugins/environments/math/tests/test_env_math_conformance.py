"""The environment and the reward of this package against the contracts of their kinds, on recorded rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_rl_core.testing import EnvironmentCase, EnvironmentContract, RewardContract
from nemo_rl_plugins_env_math.environment import MathEnvironment
from nemo_rl_plugins_env_math.reward import math_verify_reward

SAMPLE = [json.loads(line) for line in (Path(__file__).parent / "sample_rollouts.jsonl").read_text().splitlines()]
ROWS = [({"prompt": row["question"], "expected_answer": row["expected_answer"]}, row["response"]) for row in SAMPLE]
BAD_ROWS = ({"prompt": "?"}, {"prompt": "?", "answer": None}, {"prompt": "?", "answer": ""})
RIGHT = [(row, response) for (row, response), sample in zip(ROWS, SAMPLE, strict=True) if sample["library_reward"]]


class TestMathEnvironment(EnvironmentContract):
    @pytest.fixture(params=RIGHT[:3], ids=lambda example: example[0]["prompt"][:20])
    def environment(self, request):
        row, response = request.param
        return EnvironmentCase(environment=MathEnvironment, task=row, response=response, bad_tasks=BAD_ROWS)


class TestMathVerifyReward(RewardContract):
    examples = ROWS
    bad_rows = BAD_ROWS

    @pytest.fixture
    def reward(self):
        return math_verify_reward
