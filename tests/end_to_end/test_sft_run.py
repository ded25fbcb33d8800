"""SFT through the public API: it learns, validates, and says what is wrong with its rows."""

from __future__ import annotations

import json

import pytest

import nemo_rl
from nemo_rl_core.errors import ConfigError, DataError


@pytest.fixture
def pairs():
    return [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(5) for b in range(5)]


@pytest.fixture
def config(tmp_path):
    return {
        "model": "scratch:qwen2-tiny",
        "learning_rate": 3e-3,
        "batch_size": 8,
        "max_steps": 12,
        "run_dir": str(tmp_path / "run"),
        "policy": {"max_sequence_length": 32},
        "logging": {"progress": "none"},
    }


def test_the_loss_falls_on_training_and_validation_rows(config, pairs):
    result = nemo_rl.SFTTrainer({**config, "validation": {"every": 6}}).fit(pairs, validation_dataset=pairs[:8])
    losses = [entry["train/loss"] for entry in result.history]
    validated = [entry["validation/loss"] for entry in result.history if "validation/loss" in entry]
    assert losses[-1] < losses[0] - 1.0
    assert len(validated) == 2
    assert validated[1] < validated[0]


def test_validation_does_not_change_the_weights(config, pairs, tmp_path):
    models = []
    for name, every in (("with", 1), ("without", 0)):
        run = {**config, "max_steps": 3, "run_dir": str(tmp_path / name), "validation": {"every": every}}
        result = nemo_rl.SFTTrainer(run).fit(pairs, validation_dataset=pairs[:4])
        models.append((result.model_path / "model.safetensors").read_bytes())
    assert models[0] == models[1]


def test_chat_rows_from_a_file(config, tmp_path):
    path = tmp_path / "chat.jsonl"
    chat = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(8)))
    result = nemo_rl.SFTTrainer({**config, "max_steps": 2}).fit(str(path))
    assert result.metrics["train/loss"] > 0


def test_a_broken_line_is_named(config, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "respon\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        nemo_rl.SFTTrainer(config).fit(str(path))


def test_rows_without_a_response_are_named(config):
    with pytest.raises(DataError, match="response"):
        nemo_rl.SFTTrainer(config).fit([{"prompt": "a"}] * 8)


def test_a_file_that_is_not_there_is_named(config):
    with pytest.raises((DataError, ConfigError), match=r"nowhere\.jsonl"):
        nemo_rl.SFTTrainer(config).fit("nowhere.jsonl")
