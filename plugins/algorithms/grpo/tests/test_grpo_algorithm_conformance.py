"""The algorithms keep the contract of their kind, as they are and with the options that change a step."""

from __future__ import annotations

import pytest

from nemo_rl_core.testing import AlgorithmCase, AlgorithmContract
from nemo_rl_plugins_grpo.algorithm import GRPO
from nemo_rl_plugins_grpo.presets import CISPO, DAPO, GSPO, RLOO, DrGRPO, ReinforcePP

FEW_TIED = {"max_batches": 30}


class TestGRPO(AlgorithmContract):
    @pytest.fixture
    def algorithm(self):
        return GRPO


class TestSeveralUpdates(AlgorithmContract):
    @pytest.fixture
    def algorithm(self):
        return AlgorithmCase(component=GRPO, config={"updates_per_step": 2, "epochs_per_step": 2})


class TestDynamicSampling(AlgorithmContract):
    learning_steps = 5  # later on all groups are right, and none can be trained on
    reward_margin = 0.1

    @pytest.fixture
    def algorithm(self):
        sampling = {"enabled": True, **FEW_TIED}
        return AlgorithmCase(component=GRPO, config={"dynamic_sampling": sampling, "overlong_filtering": False})


class TestReference(AlgorithmContract):
    """With a KL to the reference policy."""

    @pytest.fixture
    def algorithm(self):
        loss = {"name": "clipped_pg", "options": {"reference_kl_beta": 0.01}}
        return AlgorithmCase(component=GRPO, config={"loss": loss})


class TestDAPO(AlgorithmContract):
    learning_steps = 5
    reward_margin = 0.1

    @pytest.fixture
    def algorithm(self):
        return AlgorithmCase(component=DAPO, config={"dynamic_sampling": FEW_TIED})


@pytest.mark.slow
class TestGSPO(AlgorithmContract):
    @pytest.fixture
    def algorithm(self):
        return GSPO


@pytest.mark.slow
class TestCISPO(AlgorithmContract):
    @pytest.fixture
    def algorithm(self):
        return CISPO


@pytest.mark.slow
class TestDrGRPO(AlgorithmContract):
    @pytest.fixture
    def algorithm(self):
        return DrGRPO


@pytest.mark.slow
class TestRLOO(AlgorithmContract):
    """With the KL in the reward."""

    @pytest.fixture
    def algorithm(self):
        return AlgorithmCase(component=RLOO, config={"reward_kl": {"beta": 0.01}})


class TestReinforcePP(AlgorithmContract):
    @pytest.fixture
    def algorithm(self):
        return ReinforcePP
