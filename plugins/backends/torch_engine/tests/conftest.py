"""Fixtures: engines on tiny models, in one thread."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from nemo_rl_core.protocols.launcher import WorkerContext
from nemo_rl_core.schema import GenerationConfig
from nemo_rl_plugins_torch_engine.backend import TorchEngine
from nemo_rl_plugins_torch_engine.config import TorchEngineConfig

sys.path.insert(0, str(Path(__file__).parent))

from torch_engine_kit import ARCHITECTURES, SHARED

torch.set_num_threads(1)


@pytest.fixture
def model_folder(tmp_path):
    """Makes a folder with the configuration of a tiny model and returns its `scratch:` name."""

    def make(architecture: str, **changes) -> str:
        folder = tmp_path / architecture
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**SHARED, **ARCHITECTURES[architecture], **changes}))
        return f"scratch:{folder}"

    return make


@pytest.fixture
def start():
    """Starts engines and shuts them down after the test."""
    running = []

    def make(model_name="scratch:qwen2-tiny", *, max_sequence_length=None, seed=0, **options) -> TorchEngine:
        engine = TorchEngine()
        config = GenerationConfig(
            model_name=model_name,
            max_sequence_length=max_sequence_length,
            options=TorchEngineConfig(**{"max_batch_size": 8, **options}),
        )
        engine.setup(config, WorkerContext(seed=seed, num_threads=1))
        running.append(engine)
        return engine

    yield make
    for engine in running:
        engine.shutdown()
