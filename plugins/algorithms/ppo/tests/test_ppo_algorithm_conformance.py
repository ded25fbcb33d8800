"""The algorithm keeps the contract of its kind, as it is and with the options that change its step."""

from __future__ import annotations

import pytest

from nemo_rl_core.testing import AlgorithmCase, AlgorithmContract
from nemo_rl_plugins_ppo.algorithm import PPO

FAST = {"critic_learning_rate": 1e-2}


class TestPPO(AlgorithmContract):
    learning_rate = 3e-3
    learning_steps = 12

    @pytest.fixture
    def algorithm(self):
        return AlgorithmCase(component=PPO, config=FAST)


class TestOneUpdate(AlgorithmContract):
    """One update for each batch: no forward pass for old logprobs, and a first step that is on policy."""

    @pytest.fixture
    def algorithm(self):
        return AlgorithmCase(component=PPO, config={**FAST, "epochs_per_step": 1, "num_generations_per_prompt": 4})


class TestMinibatches(AlgorithmContract):
    learning_rate = 3e-3
    learning_steps = 10

    @pytest.fixture
    def algorithm(self):
        sizes = {"updates_per_step": 2, "epochs_per_step": 2, "critic_epochs_per_step": 3, "critic_warmup_steps": 0}
        return AlgorithmCase(component=PPO, config={**FAST, **sizes})


class TestPenaltyInTheReward(AlgorithmContract):
    learning_rate = 3e-3

    @pytest.fixture
    def algorithm(self):
        return AlgorithmCase(component=PPO, config={**FAST, "reward_kl_beta": 0.01, "epochs_per_step": 2})
