"""A model written part by part is the model, and no part is held longer than its file."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_rl_core.errors import CheckpointError
from nemo_rl_core.models import load_model, write_model

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
}
SHAPES = {
    "qwen2": {**SIZES, "model_type": "qwen2", "intermediate_size": 48, "tie_word_embeddings": True},
    "qwen3_moe": {
        **SIZES,
        "model_type": "qwen3_moe",
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
}


@pytest.fixture(params=list(SHAPES))
def model(request, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[request.param]))
    return load_model(f"scratch:{tmp_path}", dtype=torch.float32)


def read(folder):
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dict(found.named_parameters())


@pytest.mark.parametrize("shard_size", [10**9, 20_000, 1])
def test_it_comes_back_bit_by_bit_and_a_layer_is_in_one_file(model, tmp_path, shard_size):
    empty = load_model(f"scratch:{tmp_path}", dtype=torch.float32, empty=True)
    alive, most = weakref.WeakSet(), 0

    def weights():
        nonlocal most
        for name, tensor in model.named_parameters():
            copy = tensor.detach().clone()
            alive.add(copy)
            most = max(most, len(alive))
            yield name, copy

    folder = tmp_path / "written"
    write_model(folder, weights(), empty, shard_size=shard_size)
    found, expected = read(folder), dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if shard_size == 10**9:
        assert files == ["model.safetensors"] and not (folder / "model.safetensors.index.json").exists()
        return
    assert len(files) >= 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert not list(folder.glob(".part*"))
    assert most < len(expected) / 2
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for layer in range(3):
        assert len({file for name, file in places.items() if f".layers.{layer}." in name}) == 1


def test_who_does_not_write_holds_nothing_and_still_takes_part(model, tmp_path):
    seen = []
    write_model(tmp_path / "nothing", (seen.append(name) or (name, t) for name, t in model.named_parameters()), None)
    assert len(seen) == len(dict(model.named_parameters())) and not (tmp_path / "nothing").exists()


def test_a_folder_that_cannot_be_written_is_named_after_all_took_part(model, tmp_path):
    (tmp_path / "file").write_text("")
    seen = []
    weights = (seen.append(name) or (name, t) for name, t in model.named_parameters())
    with pytest.raises(CheckpointError, match=r"Cannot write the model to .*file/model"):
        write_model(tmp_path / "file" / "model", weights, model, shard_size=1)
    assert len(seen) == len(dict(model.named_parameters()))
