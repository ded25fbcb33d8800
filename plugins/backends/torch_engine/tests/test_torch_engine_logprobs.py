"""What the engine samples has the probability that it says, by a full forward of the Hugging Face model."""

from __future__ import annotations

import pytest
import torch
from torch_engine_kit import ARCHITECTURES, complete, reference_logprobs, request

from nemo_rl_core.errors import ConfigError
from nemo_rl_plugins_torch_engine.attention_decoder import AttentionDecoder
from nemo_rl_plugins_torch_engine.lean import LeanDecoder
from nemo_rl_plugins_torch_engine.recompute import RecomputeDecoder

PROMPTS = [[5, 6, 7], [9] * 20, [11, 12], [5, 6, 8], list(range(4, 40))]
CHOSEN = {"llama": LeanDecoder, "llama3_rope": LeanDecoder, "qwen2": LeanDecoder, "qwen3": LeanDecoder,
          "bloom": RecomputeDecoder, "mamba": RecomputeDecoder}  # fmt: skip


def worst_error(engine, requests, completions):
    worst = 0.0
    for r, c in zip(requests, completions, strict=True):
        expected = reference_logprobs(engine, r.prompt_ids, c.token_ids, temperature=r.sampling.temperature or 1.0)
        expected = expected[torch.arange(len(c.token_ids)), torch.tensor(c.token_ids)]
        worst = max(worst, float((expected - torch.tensor(c.logprobs)).abs().max()))
    return worst


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_equal_a_full_forward_for_every_architecture(architecture, model_folder, start):
    engine = start(model_folder(architecture), max_batch_size=6)
    assert type(engine._scheduler.decoder) is CHOSEN.get(architecture, AttentionDecoder)
    requests = [
        request(p, name=f"{i}/{j}", max_new_tokens=4 + 5 * j + i, seed=10 * i + j, temperature=t, ignore_eos=True)
        for i, p in enumerate(PROMPTS)
        for j, t in enumerate((0.6, 1.0, 1.3))
    ]
    completions = complete(engine, *requests)
    assert [len(c.token_ids) for c in completions] == [r.sampling.max_new_tokens for r in requests]
    assert worst_error(engine, requests, completions) < 1e-5


@pytest.mark.parametrize("decoder", ["lean", "attention", "recompute"])
def test_decoders_sample_the_same_tokens(decoder, start):
    requests = [request(p, max_new_tokens=20, seed=i, ignore_eos=True) for i, p in enumerate(PROMPTS * 3)]
    expected = complete(start(decoder="lean"), *requests)
    assert [c.token_ids for c in complete(start(decoder=decoder), *requests)] == [c.token_ids for c in expected]


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gemma3", "mamba"])
def test_greedy_equals_transformers_generate(architecture, model_folder, start):
    engine = start(model_folder(architecture))
    completions = complete(engine, *(request(p, max_new_tokens=24, temperature=0) for p in PROMPTS))
    engine._model.set_attn_implementation("eager")
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        out = engine._model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=24, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        assert completion.token_ids == out[0, len(prompt) :].tolist()


def test_greedy_logprobs_are_untempered_beside_sampled_rows(start):
    engine = start()
    requests = [request([7, 8], max_new_tokens=12, temperature=0), request([7, 9], max_new_tokens=12, temperature=2.0)]
    completions = complete(engine, *requests)
    assert worst_error(engine, requests, completions) < 1e-5


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.7), (6, 0.8), (1, 1.0)])
def test_logprobs_are_of_the_limited_distribution(top_k, top_p, start):
    engine = start()
    requests = [
        request(p, name=str(i), max_new_tokens=15, seed=i, temperature=0.3, top_k=top_k, top_p=top_p)
        for i, p in enumerate(PROMPTS * 2)
    ]
    # an unlimited neighbour runs through the same code and must not be limited
    free = request([30, 31], max_new_tokens=15, seed=1, ignore_eos=True)
    *limited, unlimited = complete(engine, *requests, free)
    assert worst_error(engine, [free], [unlimited]) < 1e-5
    for r, c in zip(requests, limited, strict=True):
        rows = reference_logprobs(engine, r.prompt_ids, c.token_ids, temperature=0.3)
        for row, token, logprob in zip(rows, c.token_ids, c.logprobs, strict=True):
            probabilities, order = row.double().exp().sort(descending=True)
            kept = probabilities[: top_k or None] / probabilities[: top_k or None].sum()
            before = kept.cumsum(0) - kept
            if (before - top_p).abs().min() < 1e-5:
                continue  # which side of the limit a token is on is a matter of rounding
            kept = kept[before < top_p]
            place = order.tolist().index(token)
            assert place < len(kept)
            assert logprob == pytest.approx(float((kept[place] / kept.sum()).log()), abs=1e-5)


def test_bfloat16_runs_close_to_its_own_full_forward(start):
    from nemo_rl_core.protocols.launcher import WorkerContext
    from nemo_rl_core.schema import GenerationConfig

    engine = start()
    engine.shutdown()
    engine.setup(GenerationConfig(model_name="scratch:qwen2-tiny", precision="bfloat16"), WorkerContext(num_threads=1))
    requests = [request(p, max_new_tokens=10, seed=i) for i, p in enumerate(PROMPTS)]
    assert worst_error(engine, requests, complete(engine, *requests)) < 0.1


def test_a_decoder_that_does_not_fit_is_refused_by_name(model_folder, start):
    with pytest.raises(ConfigError, match=r"'attention' cannot run BloomForCausalLM .*auto"):
        start(model_folder("bloom"), decoder="attention")
