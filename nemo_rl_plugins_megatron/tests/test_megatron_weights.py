"""Weights go in and out bit by bit, however they are cut."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models import load_model
from nemo_rl_plugins_megatron import pretrained, weights
from nemo_rl_plugins_megatron.families import FAMILIES, Family
from nemo_rl_plugins_megatron.mapping import Columns, FusedGate, Gate, Heads, QueryKeyValue, Rows, Vocabulary, Whole

HEADS = Heads(num_groups=6, head_size=4, vocab_size=37)


def _whole(*shapes):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng) for shape in shapes]


class Counted:
    """A tensor that counts what is read of it."""

    def __init__(self, tensor):
        self.tensor, self.shape, self.count = tensor, tensor.shape, 0

    def __getitem__(self, where):
        self.count += self.tensor[where].numel()
        return self.tensor[where]


@pytest.mark.parametrize("size", [1, 2, 3, 6, 12])
@pytest.mark.parametrize(
    ("form", "whole"),
    [
        (Whole(), _whole((5,))),
        (Rows(), _whole((12, 5))),
        (Columns(), _whole((5, 12))),
        (Vocabulary(), _whole((37, 5))),
        (Gate(), _whole((12, 5), (12, 5))),
        (FusedGate(), _whole((24, 5))),
        (QueryKeyValue(), _whole((72, 5), (24, 5), (24, 5))),
        (QueryKeyValue(), _whole((72,), (24,), (24,))),
    ],
)
def test_what_is_cut_is_joined_again(form, whole, size):
    read = [[Counted(tensor) for tensor in whole] for _ in range(size)]
    parts = [form.cut(mine, index, size, HEADS) for index, mine in enumerate(read)]
    for mine in read:  # two ranks share a key-value head where there are 12
        most = 1 if isinstance(form, Whole) else 1 / min(size, HEADS.num_groups)
        assert sum(one.count for one in mine) <= -(-sum(one.tensor.numel() for one in mine) * most // 5) * 5
    assert len({part.shape for part in parts}) == 1
    joined = form.join(parts, HEADS)
    assert len(joined) == len(whole) and all(map(torch.equal, joined, whole))


def test_each_key_value_head_stands_behind_its_query_heads():
    heads = Heads(num_groups=2, head_size=1, vocab_size=1)
    whole = [
        torch.tensor([[1.0], [2.0], [3.0], [4.0]]),
        torch.tensor([[10.0], [20.0]]),
        torch.tensor([[100.0], [200.0]]),
    ]
    assert QueryKeyValue().cut(whole, 0, 1, heads).flatten().tolist() == [1, 2, 10, 100, 3, 4, 20, 200]
    assert QueryKeyValue().cut(whole, 1, 2, heads).flatten().tolist() == [3, 4, 20, 200]


@pytest.mark.parametrize("shape", ["llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_moe_mixed"])
def test_hugging_face_weights_come_back_bit_by_bit(make_backend, model_name, batch, tmp_path, shape):
    backend, model = make_backend(shape), load_model(model_name(shape), dtype=torch.float32)
    expected = dict(model.named_parameters())
    exported = dict(backend.export_weights())
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
    backend.export_model(tmp_path)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    again = make_backend(model_name=str(tmp_path), seed=5)
    assert torch.equal(again.get_logprobs(batch), backend.get_logprobs(batch))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (lambda rule: "o_proj" not in rule.theirs[0], r"linear_proj.*families\.py|o_proj.*families\.py"),
        (lambda rule: "lm_head" not in rule.theirs[0], r"lm_head\.weight.*families\.py"),
    ],
)
def test_a_family_whose_rules_miss_a_weight_is_refused(make_backend, monkeypatch, kept, message):
    whole = FAMILIES["qwen3"]
    partial = Family(rules=tuple(rule for rule in whole.rules if kept(rule)), settings=whole.settings)
    monkeypatch.setattr(weights, "family_of", lambda config: partial)
    with pytest.raises(ConfigError, match=message):
        make_backend("qwen3")


# -- files ------------------------------------------------------------------------------------


@pytest.fixture
def in_files(model_name, tmp_path):
    """`in_files(shape, **options)` is the folder of a checkpoint, and its model in memory."""

    def make(shape, **options):
        model = load_model(model_name(shape), dtype=torch.float32)
        model.save_pretrained(tmp_path, **options)
        return str(tmp_path), model

    return make


@pytest.mark.parametrize("shape", ["llama", "qwen2", "qwen3_moe_mixed"])
@pytest.mark.parametrize("size", ["50GB", "20KB"])
def test_files_are_read_as_the_hugging_face_library_does(make_backend, in_files, monkeypatch, shape, size):
    folder, model = in_files(shape, max_shard_size=size)
    monkeypatch.setattr(pretrained, "load_model", lambda *args, empty=False, **kw: load_model(*args, empty=True, **kw))
    exported = dict(make_backend(model_name=folder).export_weights())
    for name, tensor in model.named_parameters():
        assert torch.equal(exported[name], tensor), name


def test_a_head_that_files_do_not_have_is_drawn(make_backend, in_files):
    folder, _ = in_files("qwen3")
    exported = dict(make_backend(model_name=folder, head="scalar", seed=1).export_weights())
    expected = dict(load_model(folder, dtype=torch.float32, head="scalar", seed=1).named_parameters())
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("size", ["50GB", "20KB"])
def test_a_damaged_or_missing_file_is_named(make_backend, in_files, tmp_path, size):
    folder, _ = in_files("qwen3", max_shard_size=size)
    file = max(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=re.escape(folder)):
        make_backend(model_name=folder)
    file.unlink()
    with pytest.raises(ConfigError, match=re.escape(folder)):
        make_backend(model_name=folder)


def test_files_of_another_size_are_refused(make_backend, in_files, tmp_path):
    folder, _ = in_files("qwen3")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ConfigError, match=r"gate_proj\.weight has the shape \[48, 32\], but.*\[64, 32\]"):
        make_backend(model_name=folder)
