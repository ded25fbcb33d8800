"""Tiny models of every family, and backends on them."""

from __future__ import annotations

import json

import pytest
import torch

from nemo_rl_core.protocols.launcher import WorkerContext
from nemo_rl_core.schema import OptimizerConfig, PolicyConfig
from nemo_rl_core.testing.conformance.cases.reference import ragged_batch
from nemo_rl_plugins_megatron.backend import MegatronBackend
from nemo_rl_plugins_megatron.config import MegatronConfig

VOCAB = 97  # odd: no tensor-parallel size divides it
PADDING = 73  # a token of the tests' batch, as a policy may sample it
_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
_EXPERTS = {
    **_COMMON,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "tie_word_embeddings": False,
}
_SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPES = {
    "llama": {**_COMMON, "model_type": "llama", "tie_word_embeddings": False},
    "llama_scaled_rope": {**_COMMON, "model_type": "llama", "rope_parameters": _SCALED_ROPE},
    "qwen2": {**_COMMON, "model_type": "qwen2", "tie_word_embeddings": True, "pad_token_id": PADDING},
    "qwen3": {**_COMMON, "model_type": "qwen3", "tie_word_embeddings": False, "pad_token_id": PADDING},
    "qwen3_moe": {**_EXPERTS, "norm_topk_prob": True},
    "qwen3_moe_mixed": {**_EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [0]},
    "mistral": {**_COMMON, "model_type": "mistral"},
    "qwen2_window": {
        **_COMMON,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 0,
    },
    "llama_bias": {**_COMMON, "model_type": "llama", "attention_bias": True},
    "qwen3_yarn": {
        **_COMMON,
        "model_type": "qwen3",
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0},
    },
}
FAMILIES = ("llama", "llama_scaled_rope", "qwen2", "qwen3", "qwen3_moe", "qwen3_moe_mixed")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_name(tmp_path_factory):
    """`model_name(shape)` is a scratch model with random weights of that shape."""
    root = tmp_path_factory.mktemp("models")
    for name, shape in SHAPES.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(shape))
    return lambda name: f"scratch:{root / name}"


@pytest.fixture
def make_backend(model_name):
    """`make_backend(shape, **policy)` is a backend that has been set up on this CPU."""
    made = []

    def make(shape="qwen3", *, options=None, lr=1e-2, optimizer=None, seed=0, world_size=1, **policy):
        backend = MegatronBackend()
        config = PolicyConfig(
            model_name=policy.pop("model_name", None) or model_name(shape),
            options=options or MegatronConfig(),
            optimizer=optimizer or OptimizerConfig(lr=lr),
            **policy,
        )
        backend.setup(config, WorkerContext(seed=seed, world_size=world_size))
        made.append(backend)
        return backend

    yield make
    for backend in made:
        backend.shutdown()


@pytest.fixture
def batch():
    """Ragged sequences of random tokens."""
    return ragged_batch(vocab_size=VOCAB, seed=3)
