"""The algorithm keeps the contract of its kind."""

from __future__ import annotations

import pytest

from nemo_rl_core.testing import AlgorithmCase, AlgorithmContract
from nemo_rl_plugins_reward_model.algorithm import RewardModel

PAIRS = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "no"} for a in range(5) for b in range(5)]


class TestRewardModel(AlgorithmContract):
    @pytest.fixture
    def algorithm(self):
        return AlgorithmCase(component=RewardModel, rows=PAIRS, target=None)
