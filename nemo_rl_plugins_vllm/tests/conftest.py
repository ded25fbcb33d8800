"""Fixtures: engines that the whole session shares."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from vllm_kit import EnginePool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool():
    engines = EnginePool()
    yield engines
    engines.close()


@pytest.fixture
def engine(pool):
    """An engine with the checkpoint's weights, version 0."""
    return pool.get()
