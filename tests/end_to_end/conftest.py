"""Runs small enough for a test: the 0.08 M-parameter model, a few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def tiny(tmp_path) -> Callable[..., dict[str, Any]]:
    """A GRPO configuration as plain data; keyword arguments are merged over it."""

    def make(**changes: Any) -> dict[str, Any]:
        config: dict[str, Any] = {
            "model": "scratch:qwen2-tiny",
            "learning_rate": 1e-3,
            "num_prompts_per_step": 4,
            "num_generations_per_prompt": 4,
            "max_steps": 3,
            "run_dir": str(tmp_path / "run"),
            "policy": {"max_sequence_length": 32},
            "generation": {"max_new_tokens": 4},
            "logging": {"progress": "none"},
        }
        for name, value in changes.items():
            merged = isinstance(value, dict) and isinstance(config.get(name), dict)
            config[name] = {**config[name], **value} if merged else value
        return config

    return make


@pytest.fixture
def rows() -> list[dict[str, str]]:
    """Twenty-five additions."""
    return [dict(row) for row in ROWS]
