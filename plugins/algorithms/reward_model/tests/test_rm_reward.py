"""A trained reward model as a reward: right scores, one batch for those that come together, no influence of company."""

from __future__ import annotations

import asyncio

import pytest
import torch
from pytest import approx

from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models import load_model, load_tokenizer
from nemo_rl_core.testing import RewardContract
from nemo_rl_core.training.trainer import Trainer
from nemo_rl_plugins_reward_model.config import RewardModelRewardConfig
from nemo_rl_plugins_reward_model.reward import RewardModelReward
from nemo_rl_plugins_reward_model.scorer import width_of

torch.set_num_threads(1)


def save(folder, *, head="scalar"):
    load_model("scratch:qwen2-tiny", dtype=torch.float32, seed=3, head=head).save_pretrained(folder)
    load_tokenizer("scratch:qwen2-tiny").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("rm"))


def talk(response, prompt="1+1="):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def scores(reward, conversations):
    async def every():
        return await asyncio.gather(*(reward(messages) for messages in conversations))

    return asyncio.run(every())


def reward_of(folder, **options):
    return RewardModelReward(RewardModelRewardConfig(model=folder, device="cpu", **options))


def test_the_score_is_that_of_the_last_token(folder):
    messages = talk("it is 2")
    (found,) = scores(reward_of(folder), [messages])
    model = load_model(folder, dtype=torch.float32, head="scalar").eval()
    ids = torch.tensor([load_tokenizer(folder).apply_chat_template(messages, tokenize=True)["input_ids"]])
    with torch.no_grad():
        expected = model.score(model.base_model(input_ids=ids).last_hidden_state[0, -1]).item()
    assert found == approx(expected, rel=1e-4, abs=1e-6)
    assert scores(reward_of(folder, scale=3.0), [messages]) == [3.0 * found]


def test_a_score_does_not_depend_on_company(folder):
    reward = reward_of(folder, batch_size=4)
    conversations = [talk("x" * n) for n in (1, 2, 3, 5, 8, 13, 40, 41, 100, 2)]
    alone = [scores(reward, [messages])[0] for messages in conversations]
    assert scores(reward, conversations) == alone
    assert scores(reward, conversations[::-1]) == alone[::-1]


def test_those_that_come_together_are_scored_together(folder, monkeypatch):
    reward = reward_of(folder, batch_size=4)
    sizes = []
    inner = reward._scorer.score
    monkeypatch.setattr(reward._scorer, "score", lambda batch: sizes.append(len(batch)) or inner(batch))
    scores(reward, [talk(str(n)) for n in range(10)])
    assert sizes == [4, 4, 2]
    sizes.clear()
    scores(reward, [talk("x" * n) for n in (1, 100, 2)])
    assert sorted(sizes) == [1, 2]  # one width each


def test_widths():
    assert [width_of(n) for n in (1, 31, 32, 63, 64)] == [32, 32, 64, 64, 128]


def test_an_error_reaches_each_that_waits(folder, monkeypatch):
    reward = reward_of(folder)

    def broken(batch):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(reward._scorer, "score", broken)

    async def every():
        return await asyncio.gather(*(reward(talk(str(n))) for n in range(3)), return_exceptions=True)

    assert [str(error) for error in asyncio.run(every())] == ["out of memory"] * 3


def test_one_that_gave_up_does_not_disturb_the_others(folder):
    reward = reward_of(folder)

    async def play():
        gone = asyncio.ensure_future(reward(talk("1")))
        stays = asyncio.ensure_future(reward(talk("2")))
        await asyncio.sleep(0)
        gone.cancel()
        return await stays

    assert asyncio.run(play()) == scores(reward, [talk("2")])[0]


def test_a_model_without_a_score_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no reward model: it is Qwen2ForCausalLM"):
        reward_of(save(tmp_path, head="lm"))


def test_options_are_checked_when_the_configuration_is_loaded():
    base = {"algorithm": "grpo", "model": "scratch:qwen2-tiny"}
    with pytest.raises(ConfigError, match="batch_sise"):
        finalize(load_config({**base, "reward": {"name": "reward_model", "options": {"model": "m", "batch_sise": 1}}}))
    with pytest.raises(ConfigError, match="model"):
        finalize(load_config({**base, "reward": {"name": "reward_model"}}))


class TestRewardModelReward(RewardContract):
    @pytest.fixture
    def reward(self, folder):
        return reward_of(folder, max_sequence_length=256)


# -- in a run ------------------------------------------------------------------------------------------------


def grpo(run_dir, model, *, steps, seed=0):
    """GRPO on the scores of a reward model."""
    torch.set_num_threads(1)
    trainer = Trainer(
        {
            "algorithm": "grpo",
            "model": "scratch:qwen2-tiny",
            "learning_rate": 1e-2,
            "num_prompts_per_step": 8,
            "num_generations_per_prompt": 8,
            "max_steps": steps,
            "seed": seed,
            "run_dir": str(run_dir),
            "policy": {"max_sequence_length": 32},
            "generation": {"max_new_tokens": 8},
            "reward": {"name": "reward_model", "options": {"model": str(model), "device": "cpu", "batch_size": 16}},
            "logging": {"progress": "none"},
            "cluster": {"device": "cpu"},
        }
    )
    return trainer.fit([{"prompt": f"{n}?"} for n in range(32)])


def test_grpo_raises_the_score_of_a_trained_reward_model(tmp_path, train_on_lengths):
    model = train_on_lengths(tmp_path / "rm", center_coefficient=0.01).model_path
    history = grpo(tmp_path / "grpo", model, steps=10).history
    rewards = [entry["reward/mean"] for entry in history]
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.5


def test_a_run_with_a_reward_model_can_be_repeated(tmp_path, folder):
    losses = [
        [entry["train/loss"] for entry in grpo(tmp_path / name, folder, steps=2).history] for name in ("one", "two")
    ]
    assert losses[0] == losses[1]
