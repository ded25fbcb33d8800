"""Configuration: loaded strictly, and what cannot be meant is a mistake with its fix."""

from __future__ import annotations

import pytest

from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.errors import ConfigError
from nemo_rl_plugins_grpo.advantage_config import GroupRelativeConfig
from nemo_rl_plugins_grpo.config import GRPOConfig
from nemo_rl_plugins_grpo.loss_config import ClippedPGConfig


def load(**fields):
    return finalize(load_config({"algorithm": "grpo", "model": "m", **fields}))


def test_the_name_of_the_algorithm_picks_the_class_and_its_defaults():
    config = load()
    assert type(config) is GRPOConfig
    assert config.loss.options == ClippedPGConfig()
    assert config.advantage.options == GroupRelativeConfig()
    assert (config.num_items_per_step, config.group_size) == (32, 16)


def test_options_of_the_loss_are_structured_by_its_class():
    options = {"ratio_clip_max": 0.28, "correction": "tis", "correction_max": 2}
    config = load(loss={"name": "clipped_pg", "options": options})
    assert config.loss.options == ClippedPGConfig(ratio_clip_max=0.28, correction="tis", correction_max=2.0)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_generations_per_prompt": 1}, "num_generations_per_prompt"),
        ({"num_generations_per_prompt": 0}, "num_generations_per_prompt"),
        ({"updates_per_step": 5, "num_prompts_per_step": 4}, "at most 4"),
        ({"advantage_clip": {"low": 2.0, "high": 1.0}}, "advantage_clip.low"),
        ({"reward_scaling": {"enabled": True, "source_min": 1.0}}, "reward_scaling.source_max"),
        ({"reward_shaping": {"enabled": True, "overlong_buffer_length": 4096}}, "overlong_buffer_length"),
        ({"rollouts": {"staleness": 1}}, "loss.options.correction"),
        (
            {"epochs_per_step": 2, "loss": {"name": "clipped_pg", "options": {"force_on_policy_ratio": True}}},
            "loss.options.force_on_policy_ratio",
        ),
        ({"loss": {"name": "clipped_pg", "options": {"ratio_clip_mx": 0.3}}}, "ratio_clip_max"),
        ({"loss": {"name": "clipped_pg", "options": {"correction": "tis"}}}, "correction_max"),
        ({"loss": {"name": "clipped_pg", "options": {"reference_kl_type": "k4"}}}, "k3"),
        ({"loss": {"name": "clipped_pg", "options": {"ratio_clip_c": 0.5}}}, "ratio_clip_c"),
        ({"num_prompts_per_stp": 3}, "num_prompts_per_step"),
    ],
)
def test_mistakes_are_found_when_loading(fields, says):
    with pytest.raises(ConfigError, match=says):
        load(**fields)


class Baseline:
    """An estimator that needs no group."""

    def __init__(self, options):
        self.options = options

    def __call__(self, batch):
        return batch.expand_to_tokens(batch["rewards"])


@pytest.mark.parametrize(
    "fields",
    [
        {"num_generations_per_prompt": 1, "advantage": {"name": Baseline}},
        {"updates_per_step": 4, "num_prompts_per_step": 4},
        {"reward_shaping": {"enabled": True, "overlong_buffer_length": 4096, "stop_properly_penalty_coef": 0.5}},
        {"reward_shaping": {"overlong_buffer_length": 4096}},
        {
            "rollouts": {"staleness": 1},
            "loss": {"name": "clipped_pg", "options": {"correction": "tis", "correction_max": 2.0}},
        },
    ],
)
def test_what_can_be_meant_is_no_mistake(fields):
    assert isinstance(load(**fields), GRPOConfig)


def test_all_mistakes_come_at_once():
    with pytest.raises(ConfigError) as caught:
        load(num_generations_per_prompt=1, updates_per_step=64, reward_scaling={"enabled": True, "source_min": 2.0})
    for path in ("num_generations_per_prompt", "updates_per_step", "reward_scaling.source_max"):
        assert path in str(caught.value)
