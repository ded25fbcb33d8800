"""Decoding with reordered copies of the weights, and the threads it does so with."""

from __future__ import annotations

import threading

import pytest
import torch
from torch_engine_kit import complete, reference_logprobs, request

from nemo_rl_core.models import load_model
from nemo_rl_plugins_torch_engine import packed
from nemo_rl_plugins_torch_engine.packed import Packing

WIDE = {"hidden_size": 256, "intermediate_size": 640, "head_dim": 64, "initializer_range": 0.05}
ASKED = [request([5 + i, 6, 7], max_new_tokens=4 + 3 * i, seed=i, ignore_eos=True) for i in range(8)]


def linears(*shapes, bias):
    torch.manual_seed(0)
    return [torch.nn.Linear(i, o, bias=bias).requires_grad_(False) for o, i in shapes]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shapes", [[(384, 512)], [(384, 512), (130, 512), (130, 512)], [(7, 5)], [(7, 5), (3, 5)]])
@pytest.mark.parametrize("rows", [1, 5, 8, 20])
def test_outputs_are_those_of_the_layers(bias, shapes, rows):
    modules = linears(*shapes, bias=bias)
    layer = Packing(enabled=True, max_rows=8).linear(*modules)
    x = torch.randn(rows, shapes[0][1])
    expected = [module(x) for module in modules]
    torch.testing.assert_close(layer(x), torch.cat(expected, -1), atol=1e-5, rtol=1e-5)
    for found, part in zip(layer.split(x), expected, strict=True):
        torch.testing.assert_close(found, part, atol=1e-5, rtol=1e-5)


def test_what_is_copied_is_counted():
    big, small = linears((384, 512), (7, 5), bias=True)
    packing = Packing(enabled=True, max_rows=8)
    packing.linear(small)
    assert packing.num_bytes == 0
    packing.linear(big)
    assert packing.num_bytes == 384 * 512 * 4
    packing.linear(small, small)
    assert packing.num_bytes == 384 * 512 * 4 + 2 * (7 * 5 + 7) * 4
    off = Packing(enabled=False, max_rows=8)
    off.linear(big, big)
    off.linear(big.bfloat16())
    assert off.num_bytes == 0


@pytest.mark.parametrize("fault", ["wrong", "missing"])
def test_a_product_that_differs_or_is_missing_is_not_used(fault, monkeypatch, caplog):
    def reordered(weight, bias):
        if fault == "missing":
            raise AttributeError("no such operator")
        return packed._Copy(weight * 1.001, bias, reordered=False)

    monkeypatch.setattr(packed, "_reordered", reordered)
    (module,) = linears((384, 512), bias=True)
    packing = Packing(enabled=True, max_rows=8)
    x = torch.randn(3, 512)
    for _ in range(2):
        assert torch.equal(packing.linear(module)(x), module(x))
    assert packing.num_bytes == 0
    assert len(caplog.records) == 1
    assert ("differs" if fault == "wrong" else "no such operator") in caplog.text


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_logprobs_equal_a_full_forward_and_runs_are_equal(architecture, model_folder, start):
    name = model_folder(architecture, **WIDE)
    engine = start(name)
    completions = complete(engine, *ASKED)
    for r, c in zip(ASKED, completions, strict=True):
        rows = reference_logprobs(engine, r.prompt_ids, c.token_ids)
        assert c.logprobs == pytest.approx(rows[torch.arange(len(c.token_ids)), c.token_ids].tolist(), abs=1e-5)
    again = complete(start(name), *ASKED)
    assert [(c.token_ids, c.logprobs) for c in again] == [(c.token_ids, c.logprobs) for c in completions]
    plain = complete(start(name, packed_weights=False), *ASKED)
    assert [c.token_ids for c in plain] == [c.token_ids for c in completions]
    assert [c.logprobs for c in plain] != [c.logprobs for c in completions]  # the copies were in use


def test_copies_follow_a_weight_update(model_folder, start):
    name = model_folder("qwen2", **WIDE)
    engine = start(name)
    complete(engine, *ASKED)
    engine.update_weights(1, load_model(name, dtype=torch.float32, seed=4).named_parameters(), share=True)
    expected = complete(start(name, seed=4), *ASKED)
    assert [c.logprobs for c in complete(engine, *ASKED)] == [c.logprobs for c in expected]


def test_the_engine_counts_its_threads_alone(start):
    def fresh():
        found = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found[0]

    def in_engine(engine):
        return engine._loop.call(torch.get_num_threads, what="count", timeout_s=10)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        engine = start()
        complete(engine, ASKED[0])
        assert (in_engine(engine), torch.get_num_threads(), fresh()) == (1, 2, 2)
        complete(engine, ASKED[0])
        torch.randn(300, 300) @ torch.randn(300, 300)
        assert (in_engine(engine), torch.get_num_threads(), fresh()) == (1, 2, 2)
        capped = start(num_threads=2)  # the launcher gives 1
        assert (in_engine(capped), torch.get_num_threads(), fresh()) == (1, 2, 2)
    finally:
        torch.set_num_threads(before)


def test_dtype_is_that_of_the_weights(start):
    assert start().dtype == torch.float32
