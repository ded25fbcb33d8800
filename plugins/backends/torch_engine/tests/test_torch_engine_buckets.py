"""Padded decoding steps with static buffers: what CUDA graphs replay, run eagerly here."""

from __future__ import annotations

import pytest
import torch
from torch_engine_kit import complete, request

from nemo_rl_core.models import load_model
from nemo_rl_plugins_torch_engine.backend import TorchEngine
from nemo_rl_plugins_torch_engine.cuda_graphs import BucketedDecoder, length_bucket, row_buckets
from nemo_rl_plugins_torch_engine.decoders import build_decoder
from nemo_rl_plugins_torch_engine.passes import DecodePass, PrefillPass

CPU = torch.device("cpu")


def test_buckets():
    assert row_buckets(1) == [1]
    assert row_buckets(7) == [1, 2, 4, 7]
    assert row_buckets(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert [length_bucket(n, 4096) for n in (1, 128, 129, 1024, 1025, 4000)] == [128, 128, 256, 1024, 2048, 4096]
    assert length_bucket(129, 200) == 200


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_a_padded_step_gives_the_logits_of_the_plain_one(count):
    model = load_model("scratch:qwen2-tiny", dtype=torch.float32).requires_grad_(False)
    prompts = [[5 + i] * (2 + 3 * i) for i in range(count)]
    plain, inner = (
        build_decoder(model, choice="lean", num_rows=7, max_length=300, cache_dtype=torch.float32) for _ in "ab"
    )
    padded = BucketedDecoder(inner, capture=False)
    for decoder in (plain, padded):
        decoder.prefill(PrefillPass.of(prompts, [[i] for i in range(count)], CPU))
    for step in range(4):
        tokens = torch.arange(count) + 10 + step
        positions = torch.tensor([len(p) + step for p in prompts])
        batch = DecodePass(tokens, positions, torch.arange(count), int(positions.max()) + 1)
        torch.testing.assert_close(padded.decode(batch), plain.decode(batch), atol=1e-5, rtol=1e-5)
        if step == 1:
            padded.cache.ensure(200)  # the memory moves under the prepared steps


def test_an_engine_with_padded_steps_samples_the_same(start):
    requests = [request([5, 6 + i % 5], max_new_tokens=3 + 9 * i, seed=i, ignore_eos=True) for i in range(20)]
    expected = complete(start(max_batch_size=6), *requests)
    engine: TorchEngine = start(max_batch_size=6)
    engine._scheduler.decoder = BucketedDecoder(engine._scheduler.decoder, capture=False)
    assert [c.token_ids for c in complete(engine, *requests)] == [c.token_ids for c in expected]
    engine.update_weights(
        1, load_model("scratch:qwen2-tiny", dtype=torch.float32, seed=5).named_parameters(), share=True
    )
    changed = complete(start(max_batch_size=6, seed=5), *requests)
    assert [c.token_ids for c in complete(engine, *requests)] == [c.token_ids for c in changed]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_graphs_give_the_logits_of_eager_steps():
    from nemo_rl_core.protocols.launcher import WorkerContext
    from nemo_rl_core.schema import GenerationConfig
    from nemo_rl_plugins_torch_engine.config import TorchEngineConfig

    results = []
    for graphs in (False, True):
        engine = TorchEngine()
        options = TorchEngineConfig(max_batch_size=12, cuda_graphs=graphs)
        engine.setup(GenerationConfig(model_name="scratch:qwen2-tiny", options=options), WorkerContext(device="cuda:0"))
        requests = [request([5, 6 + i], max_new_tokens=3 + 9 * i, temperature=0, ignore_eos=True) for i in range(20)]
        results.append([c.token_ids for c in complete(engine, *requests)])
        engine.shutdown()
    assert results[0] == results[1]
