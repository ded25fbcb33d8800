"""The backend keeps the contract of its kind."""

from __future__ import annotations

import pytest

from nemo_rl_core.testing import TrainingBackendContract, run_kit
from nemo_rl_plugins_megatron.backend import MegatronBackend


class TestMegatronBackend(TrainingBackendContract):
    num_processes = 0  # below

    @pytest.fixture
    def backend(self):
        return MegatronBackend


@pytest.mark.slow
def test_two_processes():
    (result,) = run_kit(TrainingBackendContract, lambda: MegatronBackend, only=["data_parallel"]).results
    assert result.outcome == "passed", result.message
