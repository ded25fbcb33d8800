"""Folders of adapters as models, and what is said of those that are none."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models import eos_token_ids, load_model, load_model_config, load_tokenizer

BASE = "scratch:qwen2-tiny"
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def folder(tmp_path):
    """An adapter that changes what the model says."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_model(BASE, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    return tmp_path


def change(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_configuration_tokenizer_and_end_tokens_are_those_of_the_base(folder):
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer("1 + 1")["input_ids"] == load_tokenizer(BASE)("1 + 1")["input_ids"]
    assert load_model_config(str(folder)).to_dict() == load_model_config(BASE).to_dict()
    assert eos_token_ids(str(folder), tokenizer) == eos_token_ids(BASE, tokenizer)


def test_the_adapter_is_in_the_weights(folder):
    base, loaded = (dict(load_model(m, dtype=torch.float32).named_parameters()) for m in (BASE, str(folder)))
    changed = {name for name in base if not torch.equal(base[name], loaded[name])}
    assert base.keys() == loaded.keys()
    assert changed == {name for name in base if "q_proj.weight" in name or "up_proj.weight" in name}
    assert load_model(str(folder), dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    change(folder, task_type="SEQ_CLS")
    assert "ForSequenceClassification" in load_model_config(str(folder)).architectures[0]


def test_a_whole_model_beside_an_adapter_is_that_model(folder):
    load_model(BASE, dtype=torch.float32, seed=3).save_pretrained(folder)
    expected = load_model(BASE, dtype=torch.float32, seed=3).lm_head.weight
    assert torch.equal(load_model(str(folder), dtype=torch.float32).lm_head.weight, expected)


def test_what_is_wrong_with_an_adapter_is_named(folder, monkeypatch):
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.raises(ConfigError, match=r"adapter in .* cannot be added to the model it names"):
        load_model(str(folder), dtype=torch.float32)
    weights.unlink()
    with pytest.raises(ConfigError, match="has no weights: there is no adapter_model.safetensors"):
        load_model(str(folder), dtype=torch.float32)
    weights.write_bytes(whole)
    change(folder, base_model_name_or_path="scratch:qwen2-1m")
    with pytest.raises(ConfigError, match="cannot be added to the model it names"):
        load_model(str(folder), dtype=torch.float32)
    change(folder, base_model_name_or_path=None)
    with pytest.raises(ConfigError, match="does not say which model it belongs to"):
        load_model(str(folder), dtype=torch.float32)
    change(folder, base_model_name_or_path=BASE)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(ConfigError, match="pip install peft"):
            load_model(str(folder), dtype=torch.float32)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot be read: adapter_config.json"):
        load_model(str(folder), dtype=torch.float32)
