"""The names of the family: what each is made of, and what it asks of the run loop."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.algorithm import AlgorithmContext
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.registry import get_registry
from nemo_rl_core.schema import ComponentChoice
from nemo_rl_plugins_grpo import trainer
from nemo_rl_plugins_grpo.algorithm import GRPO

NAMES = ("grpo", "dapo", "gspo", "cispo", "dr_grpo", "rloo", "reinforce_pp")


def load(name, *overrides, **fields):
    return finalize(load_config({"algorithm": name, "model": "m", **fields}, overrides=list(overrides)))


def make(name, **fields):
    def resolve(kind, choice):
        return get_registry().resolve(kind, choice.name).load()(choice.options)

    component = get_registry().resolve("algorithms", name).load()
    return component(load(name, **fields), AlgorithmContext(tokenizer=None, resolve=resolve, max_sequence_length=64))


@pytest.mark.parametrize(
    ("name", "loss", "options", "advantage", "baseline"),
    [
        ("grpo", "clipped_pg", {"ratio_clip_max": 0.2, "aggregation": "token"}, "grpo", {"leave_one_out": True}),
        ("dapo", "clipped_pg", {"ratio_clip_min": 0.2, "ratio_clip_max": 0.28}, "grpo", {"leave_one_out": False}),
        ("gspo", "gspo", {"ratio_clip_min": 3e-4, "ratio_clip_max": 4e-4}, "grpo", {"normalize": True}),
        ("cispo", "cispo", {"ratio_clip_min": 1.0, "ratio_clip_max": 4.0}, "grpo", {"normalize": True}),
        ("dr_grpo", "dr_grpo", {"aggregation": "constant"}, "grpo", {"normalize": False, "leave_one_out": False}),
        ("rloo", "reinforce", {"aggregation": "sum"}, "rloo", {"whiten": False}),
        ("reinforce_pp", "clipped_pg", {"aggregation": "token"}, "reinforce_pp", {"group_baseline": False}),
    ],
)
def test_what_a_name_stands_for(name, loss, options, advantage, baseline):
    config = load(name)
    assert (config.algorithm, config.loss.name, config.advantage.name) == (name, loss, advantage)
    for choice, expected in ((config.loss.options, options), (config.advantage.options, baseline)):
        assert {field: getattr(choice, field) for field in expected} == expected
    assert isinstance(make(name), GRPO)


def test_dapo_samples_and_shapes():
    config = load("dapo", "dynamic_sampling.max_batches=3", "generation.max_new_tokens=100")
    assert (config.dynamic_sampling.enabled, config.dynamic_sampling.max_batches) == (True, 3)
    assert (config.reward_shaping.enabled, config.overlong_buffer_length) == (True, 20)
    assert load("dapo", "reward_shaping.overlong_buffer_length=7").overlong_buffer_length == 7


def test_reinforce_pp_takes_a_kl_by_token():
    config = load("reinforce_pp", "reward_kl.beta=0.1")
    assert (config.reward_kl.beta, config.reward_kl.per) == (0.1, "token")
    assert make("reinforce_pp").models.keys() == {"reference"}
    assert make("reinforce_pp", reward_kl={"beta": 0.0}).models == {}


@pytest.mark.parametrize("name", NAMES)
def test_options_are_laid_over_those_of_the_name(name):
    """By a file without and with the component's name, and by the command line."""
    plain = load(name)
    chosen = plain.loss.name
    for config in (
        load(name, "loss.options.reference_kl_beta=0.1"),
        load(name, loss={"options": {"reference_kl_beta": 0.1}}),
        load(name, loss={"name": chosen, "options": {"reference_kl_beta": 0.1}}),
    ):
        assert config.loss.name == chosen
        changed = {f for f in dir(plain.loss.options) if not f.startswith("_")}
        different = {f for f in changed if getattr(plain.loss.options, f) != getattr(config.loss.options, f)}
        assert different == {"reference_kl_beta"}


def test_another_component_has_its_own_options():
    config = load("dapo", loss="gspo", advantage={"name": "rloo"})
    assert (config.loss.options.ratio_clip_max, config.advantage.options.whiten) == (4e-4, False)


def test_dr_grpo_divides_by_the_longest_response():
    assert make("dr_grpo", generation={"max_new_tokens": 77}).loss.config.constant_length == 77
    assert make("dr_grpo", loss={"options": {"constant_length": 5}}).loss.config.constant_length == 5
    assert make("grpo", generation={"max_new_tokens": 77}).loss.config.constant_length is None


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("rloo", {"updates_per_step": 2}, "loss.name"),
        ("rloo", {"rollouts": {"staleness": 1}}, "correction"),
        ("rloo", {"num_generations_per_prompt": 1}, "num_generations_per_prompt"),
        ("gspo", {"loss": {"options": {"length_normalised": False}}}, "length_normalized"),
        ("grpo", {"reward_kl": {"beta": 0.1, "per": "token"}}, "reward_kl.per"),
        ("grpo", {"reward_kl": {"type": "k4"}}, "reward_kl.type"),
        ("grpo", {"advantage": "gdpo", "reward_scaling": {"enabled": True}}, "gdpo"),
        ("grpo", {"advantage": {"name": "pass_at_k", "options": {"k": 0}}}, "advantage.options.k"),
        ("grpo", {"loss": {"options": {"constant_length": 5}}}, "no effect"),
        ("dapo", {"reward_shaping": {"overlong_buffer_length": 4096}}, "overlong_buffer_length"),
    ],
)
def test_mistakes_are_found_when_loading(name, fields, says):
    with pytest.raises(ConfigError, match=says):
        load(name, **fields)


def test_reinforce_pp_may_have_one_rollout_a_prompt():
    assert load("reinforce_pp").num_generations_per_prompt == 1


class Strange:
    """An estimator that takes no rewards by token."""

    def __init__(self, options=None):
        pass

    def __call__(self, batch):
        return batch["loss_mask"].float()


def test_a_strangers_estimator_must_take_rewards_by_token_to_be_given_them():
    with pytest.raises(ConfigError, match="takes_token_rewards"):
        make("reinforce_pp", advantage=ComponentChoice(name=Strange))


def test_a_step_of_reinforce_pp_by_hand():
    """Reward 1 and 0, KL 0.5 at one token: returns 1 - 0.5 and 0, whitened to +-0.707."""
    batch = BatchedDataDict(
        [2, 2],
        {
            "loss_mask": torch.tensor([False, True] * 2),
            "rollout_logprobs": torch.tensor([0.0, -1.0, 0.0, -1.0]),
            "ref_logprobs": torch.tensor([0.0, -1.5, 0.0, -1.0]),
        },
        {"rewards": torch.tensor([1.0, 0.0]), "group_ids": torch.tensor([0, 1])},
    )
    metrics = make("reinforce_pp", reward_kl={"beta": 1.0}).finish_batch(batch)
    assert batch["advantages"].tolist() == pytest.approx([0.0, 0.5**0.5, 0.0, -(0.5**0.5)])
    assert metrics["reward_kl"] == pytest.approx(0.25)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_has_a_trainer(name):
    classes = [getattr(trainer, found) for found in trainer.__all__]
    (found,) = [c for c in classes if c.algorithm == name]
    assert found.__name__.removesuffix("Trainer").lower() == name.replace("_", "")


def test_configurations_are_checked_without_torch():
    code = (
        "import sys; from nemo_rl_core.config import finalize, load_config; "
        "import nemo_rl_plugins_grpo.presets, nemo_rl_plugins_grpo.config; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
