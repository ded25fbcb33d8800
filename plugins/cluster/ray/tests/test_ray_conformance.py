"""The Ray launcher keeps the contract of its kind."""

from __future__ import annotations

import pytest

from nemo_rl_core.testing import LauncherContract
from nemo_rl_plugins_ray.launcher import RayLauncher

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow, pytest.mark.usefixtures("connected")]


class TestRayLauncher(LauncherContract):
    hang_s = 5.0
    config_options = {"failure_grace_s": 2.0}  # noqa: RUF012

    @pytest.fixture
    def launcher(self):
        return RayLauncher
