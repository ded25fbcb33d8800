"""What the engine's tests share: tiny architectures, requests, and the reference forward."""

from __future__ import annotations

import asyncio

import torch

from nemo_rl_core.protocols.generation_backend import GenerationRequest, SamplingParams

SHARED = {
    "vocab_size": 104, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "eos_token_id": 1, "pad_token_id": 0,
    "bos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
ARCHITECTURES = {
    "llama": {"model_type": "llama"},
    "llama3_rope": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
    "mistral_window": {"model_type": "mistral", "sliding_window": 6},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gemma2": {"model_type": "gemma2", "sliding_window": 6, "attn_logit_softcapping": 5.0,
               "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gpt_neox": {"model_type": "gpt_neox"},
    "bloom": {"model_type": "bloom", "n_layer": 2, "n_head": 4},
    "mamba": {"model_type": "mamba", "state_size": 4},
}  # fmt: skip


def request(prompt, *, name="r", **sampling) -> GenerationRequest:
    return GenerationRequest(request_id=name, prompt_ids=prompt, sampling=SamplingParams(**sampling))


def generate(engine, *requests, timeout_s=60.0):
    """All completions of `requests`, asked for at once; an error is returned in its place."""

    async def run():
        calls = asyncio.gather(*(engine.generate(r) for r in requests), return_exceptions=True)
        return await asyncio.wait_for(calls, timeout_s)

    results = asyncio.run(run())
    return results


def complete(engine, *requests):
    """As `generate`, but an error is raised."""
    results = generate(engine, *requests)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def reference_logprobs(engine, prompt, completion, *, temperature=1.0):
    """[T, V] logprobs of a full forward through the Hugging Face module with its own attention."""
    model = engine._model
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    ids = torch.tensor([list(prompt) + list(completion)])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
    model.set_attn_implementation(ours)
    return (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
