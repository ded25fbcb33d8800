"""Tiny models of several families, and ragged batches to train them on."""

from __future__ import annotations

import json

import pytest
import torch

from nemo_rl_core.protocols.launcher import WorkerContext
from nemo_rl_core.protocols.loss import LossSums, Metric
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.schema import OptimizerConfig, PolicyConfig
from nemo_rl_core.training.model.normalize import NormalizedLoss, count_trained
from nemo_rl_plugins_dtensor.backend import DTensorBackend
from nemo_rl_plugins_dtensor.config import DTensorConfig

VOCAB = 96
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
SHAPES = {
    "llama": {**_COMMON, "model_type": "llama", "tie_word_embeddings": False},
    "qwen2": {**_COMMON, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**_COMMON, "model_type": "qwen3", "tie_word_embeddings": False},
    "mistral": {**_COMMON, "model_type": "mistral", "sliding_window": 6, "tie_word_embeddings": False},
    "gemma3": {
        **_COMMON,
        "model_type": "gemma3_text",
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "initializer_range": 0.1,
    },
    "gemma2": {
        **_COMMON,
        "model_type": "gemma2",
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
        "initializer_range": 0.1,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "vocab_size": VOCAB,
        "initializer_range": 0.2,
    },
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_name(tmp_path_factory):
    """`model_name(family)` is a scratch model with random weights of that family."""
    root = tmp_path_factory.mktemp("models")
    for family, shape in SHAPES.items():
        (root / family).mkdir()
        (root / family / "config.json").write_text(json.dumps(shape))
    return lambda family: f"scratch:{root / family}"


@pytest.fixture
def make_backend(model_name):
    """`make_backend(family, **policy)` is a backend that has been set up on this CPU."""
    made = []

    def make(family="qwen2", *, options=None, lr=1e-2, optimizer=None, seed=0, **policy):
        backend = DTensorBackend()
        config = PolicyConfig(
            model_name=policy.pop("model_name", None) or model_name(family),
            options=options or DTensorConfig(),
            optimizer=optimizer or OptimizerConfig(lr=lr),
            **policy,
        )
        backend.setup(config, WorkerContext(seed=seed))
        made.append(backend)
        return backend

    yield make
    for backend in made:
        backend.shutdown()


def ragged_batch(lengths=(5, 17, 9, 20, 20, 12, 7, 3), seed=0):
    """Random tokens; about two thirds of them are trained, never a first one."""
    rng = torch.Generator().manual_seed(seed)
    batch = BatchedDataDict(lengths)
    batch.set_tokens("input_ids", torch.randint(0, VOCAB, (batch.num_tokens,), generator=rng))
    batch.set_tokens("loss_mask", (torch.rand(batch.num_tokens, generator=rng) > 0.3) & (batch.position_ids > 0))
    batch.set_tokens("advantages", torch.randn(batch.num_tokens, generator=rng))
    return batch


@pytest.fixture
def batch():
    return ragged_batch()


@pytest.fixture
def make_batch():
    return ragged_batch


class WeightedLoss:
    """-sum(advantage * logprob), with what tests want to look at as metrics."""

    denominator = "tokens"

    def __init__(self, needs=("logprobs",), spoil=None):
        self.needs = frozenset(needs)
        self.spoil = spoil

    def __call__(self, outputs, batch):
        mask = batch["loss_mask"]
        total = -(outputs.logprobs * batch["advantages"] * mask).sum()
        if outputs.entropy is not None:
            total = total - 0.1 * (outputs.entropy * mask).sum()
        if self.spoil is not None:
            total = total * self.spoil
        logprobs = outputs.logprobs.detach()
        metrics = {
            "logprob": Metric((logprobs * mask).sum(), mask.sum()),
            "lowest": Metric(logprobs.min(), reduction="min"),
        }
        return LossSums(total, metrics)


@pytest.fixture
def make_loss():
    """`make_loss(batch)`: a loss divided by the counts of the whole batch, as the core makes it."""

    def make(batch, **kwargs):
        return NormalizedLoss(WeightedLoss(**kwargs), count_trained(batch))

    return make
