"""Families of models, before and after refits: each has layers that vLLM packs in its own way."""

from __future__ import annotations

from typing import Any

import pytest
from vllm_kit import SHAPE, EnginePool, complete, largest_difference, needs_vllm, request

from nemo_rl_core.errors import GenerationError
from nemo_rl_core.infra.weights.fingerprint import fingerprint
from nemo_rl_core.testing.conformance.cases.reference import tiny_model
from nemo_rl_plugins_vllm import refit

pytestmark = needs_vllm
PROMPT = (20, 31, 42, 53, 64)


def family(model_type: str, architecture: str, *, tied: bool, **more: Any) -> dict[str, Any]:
    return {
        **SHAPE,
        "model_type": model_type,
        "architectures": [architecture],
        "tie_word_embeddings": tied,
        "attention_dropout": 0.0,
        **more,
    }


# A width of 48 is padded to 64 by the CPU's kernel of experts.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
FAMILIES = {  # qwen2, with tied embeddings, is the model of all other tests
    "llama": family("llama", "LlamaForCausalLM", tied=True),
    "qwen3": family("qwen3", "Qwen3ForCausalLM", tied=False),
    "qwen3-experts": family("qwen3_moe", "Qwen3MoeForCausalLM", tied=False, **EXPERTS),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_each_family_samples_as_transformers_does_after_refits(name, monkeypatch):
    monkeypatch.setattr(refit, "_MIB", 20_000)  # several pieces, of which some come before an update breaks off
    tiny, pool = tiny_model(FAMILIES[name]), EnginePool(FAMILIES[name])
    ask = request(PROMPT, seed=1, max_new_tokens=12, ignore_eos=True)
    try:
        engine = pool.get(max_sequence_length=64, refit_chunk_mib=1)
        assert largest_difference(tiny.model, PROMPT, complete(engine, ask)[0]) < 1e-4
        for version in (1, 2):
            new = tiny.weights() if version == 1 else tiny.changed_weights()
            engine.update_weights(version, iter(new.items()))
            assert engine.fingerprint() == fingerprint(new.items())
            assert largest_difference(tiny.copy(new), PROMPT, complete(engine, ask)[0]) < 1e-4
        broken = {name: tensor for name, tensor in new.items() if "layers.1" not in name}
        with pytest.raises(GenerationError, match="did not come"):
            engine.update_weights(3, iter(broken.items()))
        engine.update_weights(4, iter(new.items()))
        assert largest_difference(tiny.copy(new), PROMPT, complete(engine, ask)[0]) < 1e-4
    finally:
        pool.close()
