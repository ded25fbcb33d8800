"""The configuration: defaults of the critic, shorthands, and mistakes between fields."""

from __future__ import annotations

import pytest

from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.errors import ConfigError

BASE = {"algorithm": "ppo", "model": "scratch:qwen2-tiny"}


def load(**fields):
    return finalize(load_config({**BASE, **fields}))


def test_the_critic_has_its_own_learning_rate():
    config = load(learning_rate=1e-4, critic_learning_rate=3e-4)
    assert (config.policy.optimizer.lr, config.critic.optimizer.lr) == (1e-4, 3e-4)
    assert load(critic={"optimizer": {"weight_decay": 0.0}}).critic.optimizer.lr == 5e-6
    assert load().critic.head == "scalar"
    assert load(critic={"num_workers": 2}).critic.head == "scalar"


def test_the_arithmetic_of_a_step():
    config = load(num_prompts_per_step=4, num_generations_per_prompt=2, updates_per_step=2, epochs_per_step=3)
    assert (config.num_items_per_step, config.group_size) == (4, 2)
    assert (config.num_updates_per_step, config.num_passes_per_step, config.num_critic_epochs) == (6, 3, 3)
    assert load(critic_epochs_per_step=1).num_critic_epochs == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"updates_per_step": 9, "num_prompts_per_step": 2, "num_generations_per_prompt": 4},
            r"updates_per_step.*9 minibatches need as many rollouts, and a step has 8",
        ),
        ({"critic_warmup_steps": 5, "max_steps": 5}, r"critic_warmup_steps.*the policy is not trained"),
        ({"critic": {"scheduler": {"name": "linear"}}}, r"critic.scheduler.total_steps.*must know when it ends"),
        (
            {"reward_kl_beta": 0.1, "loss": {"name": "ppo_clip", "options": {"reference_kl_beta": 0.1}}},
            r"two penalties for one thing",
        ),
        ({"rollouts": {"staleness": 1}}, r"loss.options.ratio_against.*biased"),
        ({"critic": {"head": "lm"}}, r"critic.head.*'lm'"),
        ({"critic": {"num_workers": 3, "tensor_parallel_size": 2}}, r"critic.num_workers.*3 workers cannot be divided"),
        ({"critic": {"trained": False}}, r"critic.trained.*follows from its role"),
        ({"critic_learning_rate": 1e-4, "critic": {"optimizer": {"lr": 1e-3}}}, r"is a shorthand for it"),
        ({"critic": {"lerning_rate": 1}}, r"lerning_rate"),
        ({"reward_kl_type": "k4"}, r"reward_kl_type"),
        ({"advantage": {"name": "gae", "options": {"gamma": 2.0}}}, r"gamma"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load(**fields)
