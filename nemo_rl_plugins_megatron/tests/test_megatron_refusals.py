"""A model or a layout that is not available is refused with the fix, before any process waits for another."""

from __future__ import annotations

import pytest

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.schema import OptimizerConfig, SchedulerConfig
from nemo_rl_plugins_megatron.config import MegatronConfig


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("mistral", r"type 'mistral'; it knows llama, qwen2, qwen3, qwen3_moe.*policy\.backend: dtensor"),
        ("qwen2_window", r"layer_types.*sliding_attention.*policy\.backend: dtensor"),
        ("llama_bias", r"attention_bias is True.*policy\.backend: dtensor"),
        ("qwen3_yarn", r"rotary embeddings of type 'yarn'.*policy\.backend: dtensor"),
    ],
)
def test_a_model_that_its_layers_cannot_do(make_backend, shape, message):
    with pytest.raises(ConfigError, match=message):
        make_backend(shape)
    make_backend("llama")  # the refusal left nothing behind


@pytest.mark.parametrize(
    ("shape", "world_size", "options", "policy", "message"),
    [
        (
            "qwen3",
            3,
            {},
            {"tensor_parallel_size": 3},
            r"policy\.tensor_parallel_size: 3 does not divide .*num_key_value_heads 2.*Sizes that do: 1, 2, 4\.",
        ),
        (
            "qwen3",
            3,
            {"pipeline_parallel_size": 3},
            {},
            r"options\.pipeline_parallel_size: 3 does not divide the model's num_hidden_layers 2.*do: 1, 2\.",
        ),
        ("qwen3_moe", 3, {"expert_parallel_size": 3}, {}, r"expert_parallel_size: 3 .*num_experts 4.*1, 2, 4\."),
        ("qwen3", 2, {"expert_parallel_size": 2}, {}, r"expert_parallel_size: 2, but qwen3 models have no experts"),
        (
            "qwen3",
            1,
            {},
            {"tensor_parallel_size": 2},
            r"policy\.num_workers: 1, .*tensor_parallel_size 2 x .*= 2 workers.*Set it to 2",
        ),
        (
            "qwen3",
            6,
            {"pipeline_parallel_size": 2, "context_parallel_size": 2},
            {},
            r"policy\.num_workers: 6, .*= 4 workers.*Set it to (8|4)",
        ),
        ("qwen3_moe", 2, {"expert_parallel_size": 4}, {}, r"experts of one replica take expert_parallel_size 4.*= 4"),
        (
            "qwen3_moe",
            2,
            {"sequence_parallel": False},
            {"tensor_parallel_size": 2},
            r"sequence_parallel: a mixture.*Set it to true",
        ),
    ],
)
def test_a_layout_that_does_not_fit(make_backend, shape, world_size, options, policy, message):
    with pytest.raises(ConfigError, match=message):
        make_backend(shape, world_size=world_size, options=MegatronConfig(**options), **policy)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            {"optimizer": OptimizerConfig(name="torch.optim.Adagrad")},
            r"'torch\.optim\.Adagrad', which megatron-core does not have.*torch\.optim\.AdamW",
        ),
        ({"optimizer": OptimizerConfig(options={"rho": 1})}, r"take no rho\. Known are"),
        (
            {"optimizer": OptimizerConfig(name="torch.optim.SGD")},
            r"'torch\.optim\.SGD', which megatron-core's distributed .*distributed_optimizer: false",
        ),
        ({"scheduler": SchedulerConfig(name="linear")}, r"where the decay ends"),
    ],
)
def test_an_optimizer_that_there_is_not(make_backend, policy, message):
    with pytest.raises(ConfigError, match=message):
        make_backend(**policy)
