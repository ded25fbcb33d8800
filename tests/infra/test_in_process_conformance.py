"""The in-process weight sync keeps the contract of its kind."""

from __future__ import annotations

import pytest

from nemo_rl_core.infra.weights.in_process import InProcessSync
from nemo_rl_core.testing import WeightSyncContract


class TestInProcessSync(WeightSyncContract):
    @pytest.fixture
    def weight_sync(self):
        return InProcessSync()
