"""The engine keeps the contract of its kind."""

from __future__ import annotations

import pytest
from vllm_kit import LONG, SHAPE, needs_vllm

from nemo_rl_core.testing import GenerationBackendContract
from nemo_rl_plugins_vllm.backend import VLLMEngine

pytestmark = needs_vllm


class TestVLLMEngine(GenerationBackendContract):
    model_shape = SHAPE
    timeout_s = 300.0
    wait_s = 120.0

    @pytest.fixture
    def engine(self):
        return VLLMEngine

    @pytest.fixture
    def start(self, engine, pool):
        """As the kit's own, with engines that are kept: a context is short, or as long as any clause asks for."""

        def make(*, max_sequence_length: int = LONG, seed: int = 0) -> VLLMEngine:
            length = max_sequence_length if max_sequence_length < 100 else LONG
            return pool.get(max_sequence_length=length, seed=seed)

        return make
