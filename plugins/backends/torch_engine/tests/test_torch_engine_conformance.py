"""The engine keeps the contract of its kind, with each of its decoders."""

from __future__ import annotations

import pytest

from nemo_rl_core.testing import GenerationBackendContract
from nemo_rl_plugins_torch_engine.backend import TorchEngine


class TestTorchEngine(GenerationBackendContract):
    @pytest.fixture
    def engine(self):
        return TorchEngine


class TestSmallBatches(TestTorchEngine):
    """Requests wait for a row, and prompts for their prefill."""

    config_options = {"max_batch_size": 3, "max_prefill_tokens": 8}  # noqa: RUF012
    num_concurrent = 20


class TestAttentionDecoder(TestTorchEngine):
    config_options = {"decoder": "attention"}  # noqa: RUF012


class TestRecomputeDecoder(TestTorchEngine):
    config_options = {"decoder": "recompute"}  # noqa: RUF012
    num_concurrent = 20
