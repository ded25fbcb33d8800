"""The local launcher keeps the contract of its kind."""

from __future__ import annotations

import pytest

from nemo_rl_core.infra.workers.local import LocalLauncher
from nemo_rl_core.testing import LauncherContract


@pytest.mark.slow
class TestLocalLauncher(LauncherContract):
    @pytest.fixture
    def launcher(self):
        return LocalLauncher
