"""The environment and the dataset of this package against the contracts of their kinds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_rl_core.testing import DatasetContract, EnvironmentCase, EnvironmentContract
from nemo_rl_plugins_env_reasoning_gym.dataset import ReasoningGymData, ReasoningGymSource
from nemo_rl_plugins_env_reasoning_gym.environment import ReasoningGymEnvironment

SAMPLE = [json.loads(line) for line in (Path(__file__).parent / "sample_rollouts.jsonl").read_text().splitlines()]
RIGHT = [row for row in SAMPLE if row["reward"] == 1.0]

DATA = {
    "one-task": {"task": "chain_sum", "size": 20},
    "mixture": {"tasks": {"chain_sum": 1.0, "leg_counting": 2.0}, "size": 20},
    "curriculum": {"task": "chain_sum", "curriculum": [{"rows": 6, "level": 0}, {"rows": 6, "level": 1}]},
}


class TestReasoningGymEnvironment(EnvironmentContract):
    @pytest.fixture(params=RIGHT[:3], ids=lambda row: row["response"].strip()[:12])
    def environment(self, request):
        row = request.param
        task = {name: row[name] for name in ("question", "answer", "metadata")}
        return EnvironmentCase(
            environment=ReasoningGymEnvironment,
            task={"prompt": row["question"], **task},
            response=row["response"],
            bad_tasks=({"prompt": "?"}, {"prompt": "?", "question": "?", "answer": "1", "metadata": {}}),
        )


class TestReasoningGymSource(DatasetContract):
    @pytest.fixture(params=DATA.values(), ids=list(DATA))
    def dataset(self, request):
        from nemo_rl_core.config.structure import structure

        config, mistakes = structure(request.param, ReasoningGymData)
        assert mistakes == []
        return ReasoningGymSource(config)
