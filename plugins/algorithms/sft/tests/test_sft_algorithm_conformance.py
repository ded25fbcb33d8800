"""The algorithm keeps the contract of its kind."""

from __future__ import annotations

import pytest

from nemo_rl_core.testing import AlgorithmContract
from nemo_rl_plugins_sft.algorithm import SFT


class TestSFT(AlgorithmContract):
    @pytest.fixture
    def algorithm(self):
        return SFT
