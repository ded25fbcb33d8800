"""The backend keeps the contract of its kind, with packed and with padded attention."""

from __future__ import annotations

import pytest

from nemo_rl_core.testing import TrainingBackendContract, run_kit
from nemo_rl_plugins_dtensor.backend import DTensorBackend


class TestDTensorBackend(TrainingBackendContract):
    num_processes = 0  # below

    @pytest.fixture
    def backend(self):
        return DTensorBackend


class TestPaddedAttention(TestDTensorBackend):
    config_options = {"attention": "padded"}  # noqa: RUF012


@pytest.mark.slow
def test_two_processes():
    (result,) = run_kit(TrainingBackendContract, lambda: DTensorBackend, only=["data_parallel"]).results
    assert result.outcome == "passed", result.message
