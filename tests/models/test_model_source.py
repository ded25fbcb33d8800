"""Model names: scratch shapes, folders, and what is said when a name leads nowhere."""

from __future__ import annotations

import json

import pytest
import torch

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models import eos_token_ids, load_model, load_model_config, load_tokenizer, located, scratch_names


def test_every_shipped_shape_loads_with_its_tokenizer():
    for name in scratch_names():
        config = load_model_config(f"scratch:{name}")
        tokenizer = load_tokenizer(f"scratch:{name}")
        assert config.vocab_size == len(tokenizer)
        assert eos_token_ids(f"scratch:{name}", tokenizer) == (config.eos_token_id,)


def test_the_seed_decides_the_weights_and_the_global_rng_is_untouched():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = (load_model("scratch:qwen2-tiny", dtype=torch.float32, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_text_survives_the_character_tokenizer():
    tokenizer = load_tokenizer("scratch:qwen2-tiny")
    text = "a  b\n12 + 3 = {?}"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_exported_model_folder_gives_the_same_tokens(tmp_path):
    tokenizer = load_tokenizer("scratch:qwen2-tiny")
    load_model("scratch:qwen2-tiny", dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.encode("1 + 2 =") == tokenizer.encode("1 + 2 =")
    assert again.chat_template == tokenizer.chat_template


def test_a_local_folder_is_named_so_that_any_process_finds_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/mine").mkdir(parents=True)
    assert located("models/mine") == str(tmp_path / "models/mine")
    assert located("scratch:models/mine") == f"scratch:{tmp_path}/models/mine"
    for name in ("scratch:qwen2-1m", "Qwen/Qwen2.5-3B-Instruct"):
        assert located(name) == name


def test_a_chat_template_may_be_text_or_a_file(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{{ messages[0]['content'] }}")
    for template in (str(path), "{{ messages[0]['content'] }}"):
        assert load_tokenizer("scratch:qwen2-tiny", chat_template=template).chat_template == path.read_text()


def test_a_meta_model_has_no_weights():
    model = load_model("scratch:qwen2-10m", dtype=torch.float32, empty=True)
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("load", [load_model_config, load_tokenizer])
def test_an_unknown_scratch_name_lists_those_there_are(load):
    with pytest.raises(ConfigError, match=r"no shape of that name.*scratch:qwen2-tiny"):
        load("scratch:qwen9")


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as a Hugging Face checkpoint"):
        load_model_config(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ConfigError, match="holds no tokenizer.*policy.tokenizer_name"):
        load_tokenizer(str(tmp_path))


def test_truncated_weights_are_named(tmp_path):
    load_model("scratch:qwen2-tiny", dtype=torch.float32).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="Cannot load the weights"):
        load_model(str(tmp_path), dtype=torch.float32)
