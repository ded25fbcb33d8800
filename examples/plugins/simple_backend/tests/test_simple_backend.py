from __future__ import annotations

import pytest
from simple_backend import SimpleBackend, SimpleConfig

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.launcher import WorkerContext
from nemo_rl_core.schema import PolicyConfig
from nemo_rl_core.testing import TrainingBackendContract


class TestContract(TrainingBackendContract):
    """Everything that the core expects of a training backend."""

    @pytest.fixture
    def backend(self):
        return SimpleBackend


def test_it_says_what_it_cannot_do():
    config = PolicyConfig(model_name="scratch:qwen2-tiny", options=SimpleConfig())
    with pytest.raises(ConfigError, match="one process"):
        SimpleBackend().setup(config, WorkerContext(world_size=2))
