"""Whole runs that train adapters: they learn, resume bit for bit, and load the model once."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

import nemo_rl
from nemo_rl_core.backends import sealed_file
from nemo_rl_core.training.model.policy import InitialModel
from nemo_rl_core.training.reporting.record import read_metrics

# Not imported here: the processes that run the reward import this module.
pytestmark = [pytest.mark.skipif(find_spec("peft") is None, reason="needs peft"), pytest.mark.xdist_group("lora")]


def a_digit(response):
    return float(any(c.isdigit() for c in response))


def with_lora(config, **lora):
    config["policy"] = {**config["policy"], "options": {"lora": {"rank": 8, **lora}}}
    return config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that answers any sum with a letter or a digit; adapters need a model whose output layer has learnt."""
    texts = ("x", "y", "1", "2")
    rows = [{"prompt": f"{a}+{b}=", "response": text} for a in range(5) for b in range(5) for text in texts]
    rows += [{"prompt": f"{text}?", "response": text} for text in texts for _ in range(25)]  # tells the texts apart
    config = {
        "model": "scratch:qwen2-tiny",
        "learning_rate": 3e-3,
        "max_steps": 120,
        "batch_size": 100,
        "run_dir": str(tmp_path_factory.mktemp("base")),
        "policy": {"max_sequence_length": 32},
        "logging": {"progress": "none"},
    }
    return str(nemo_rl.SFTTrainer(config).fit(rows).model_path)


def test_grpo_learns_through_merged_weights(tiny, rows, base):
    config = with_lora(
        tiny(
            model=base,
            max_steps=12,
            num_prompts_per_step=8,
            num_generations_per_prompt=8,
            learning_rate=3e-3,
            generation={"max_new_tokens": 1},
        )
    )
    result = nemo_rl.GRPOTrainer(config).fit(rows, a_digit)
    rewards = [entry["reward/mean"] for entry in result.history]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    # What sampled is what trains: the engine had base + adapter, the trainer has them apart.
    assert all(entry["train/token_mult_prob_error"] < 1.0001 for entry in result.history)


def test_sft_learns_and_writes_an_adapter(tiny, base):
    rows = [{"prompt": f"{a}+{b}=", "response": "1"} for a in range(5) for b in range(5)]
    config = with_lora({**tiny(model=base), "max_steps": 60, "batch_size": 25, "learning_rate": 1e-2})
    for name in ("num_prompts_per_step", "num_generations_per_prompt", "generation"):
        del config[name]
    result = nemo_rl.SFTTrainer(config).fit(rows)
    losses = [entry["train/loss"] for entry in result.history]
    assert losses[-1] < 0.5 * losses[0]
    assert sorted(p.name for p in result.model_path.glob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("algorithm", ["grpo", "sft"])
def test_a_resumed_run_equals_an_uninterrupted_one(tiny, rows, tmp_path, algorithm):
    def run(folder, steps):
        config = with_lora(tiny(run_dir=str(tmp_path / folder), max_steps=steps, checkpointing={"every": 2}))
        if algorithm == "grpo":
            # The KL to the reference, which is this model with its adapters off, must be the same after the resume.
            config["loss"] = {"name": "clipped_pg", "options": {"reference_kl_beta": 0.1}}
            return nemo_rl.GRPOTrainer(config).fit(rows, a_digit)
        for name in ("num_prompts_per_step", "num_generations_per_prompt", "generation"):
            del config[name]
        return nemo_rl.SFTTrainer({**config, "batch_size": 5}).fit(
            [{"prompt": row["prompt"], "response": row["answer"]} for row in rows]
        )

    whole = run("whole", 4)
    run("parts", 2)
    resumed = run("parts", 4)
    a, b = (load_file(result.model_path / "adapter_model.safetensors") for result in (whole, resumed))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    metrics = [list(read_metrics(result.run_dir))[-1] for result in (whole, resumed)]
    names = [name for name in metrics[0] if name.startswith(("train/", "reward/"))]
    assert [metrics[0][name] for name in names] == [metrics[1][name] for name in names]


def test_the_reference_is_the_policy_without_adapters(tiny, rows):
    seen = {}

    class Look(nemo_rl.Callback):
        def on_batch(self, run, batch):
            seen.setdefault(run.step, (batch["ref_logprobs"].clone(), batch["rollout_logprobs"].clone()))

    config = with_lora(tiny(max_steps=3, learning_rate=3e-2))
    config["loss"] = {"name": "clipped_pg", "options": {"reference_kl_beta": 0.1}}
    nemo_rl.GRPOTrainer(config).fit(rows, a_digit, callbacks=[Look()])
    assert torch.allclose(*seen[0], atol=1e-4)  # before the first step they are one model
    assert not torch.allclose(*seen[2], atol=1e-2)


def test_no_second_model_is_loaded_for_the_reference(tiny, rows, tmp_path):
    from nemo_rl_core.config import finalize, load_config
    from nemo_rl_core.training.model.policy import Policy
    from nemo_rl_core.training.setup.assemble import assemble
    from nemo_rl_core.training.setup.parts import RunInputs

    loss = {"name": "clipped_pg", "options": {"reference_kl_beta": 0.1}}
    for options, kind in (({"lora": {}}, InitialModel), ({}, Policy)):
        tree = {"algorithm": "grpo", **tiny(loss=loss)}
        tree["policy"] = {**tree["policy"], "options": options}
        parts = assemble(finalize(load_config(tree)), RunInputs(train_rows=rows, reward=a_digit), run_dir=str(tmp_path))
        try:
            assert type(parts.models["reference"]) is kind
            assert parts.share_weights == (not options)
            assert set(parts.trained) == {"policy"}
        finally:
            parts.close()


@pytest.mark.slow
def test_two_processes_with_a_reference(tiny, rows):
    config = with_lora(tiny(max_steps=2))
    config["loss"] = {"name": "clipped_pg", "options": {"reference_kl_beta": 0.1}}
    alone = nemo_rl.GRPOTrainer({**config, "run_dir": config["run_dir"] + "1"}).fit(rows, a_digit).history
    config["policy"]["num_workers"] = 2
    both = nemo_rl.GRPOTrainer(config).fit(rows, a_digit).history
    for name in ("train/loss", "train/grad_norm", "reward/mean"):
        assert [e[name] for e in both] == pytest.approx([e[name] for e in alone], rel=1e-3, abs=1e-6)


# -- the other algorithms ----------------------------------------------------------------------------------


def settings_of(tiny, base, **changes):
    """A run on rows, with adapters."""
    config = with_lora(tiny(model=base, learning_rate=1e-2))
    for name in ("num_prompts_per_step", "num_generations_per_prompt", "generation"):
        del config[name]
    return {**config, **changes}


def test_dpo_takes_its_reference_from_the_policy(tiny, base):
    """ln 2 at the start: with the adapters off the policy is the reference; and the preference is learned."""
    pairs = [{"prompt": f"{a}+{b}=", "chosen": "1", "rejected": "x"} for a in range(5) for b in range(5)]
    seen = []

    class Look(nemo_rl.Callback):
        def on_batch(self, run, batch):
            seen.append(batch["ref_logprobs"].sum())

    config = settings_of(tiny, base, max_steps=15, batch_size=25)
    history = nemo_rl.DPOTrainer(config).fit(pairs, callbacks=[Look()]).history
    assert history[0]["train/loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert history[-1]["train/rewards/margins"] > 1.0
    assert torch.stack(seen).std() < 1e-3 * seen[0].abs()  # the same rows, the same reference


def test_ppo_adapts_the_policy_and_its_critic(tiny, rows, base, tmp_path):
    config = with_lora(
        tiny(
            model=base,
            max_steps=10,
            num_prompts_per_step=8,
            num_generations_per_prompt=8,
            learning_rate=3e-3,
            generation={"max_new_tokens": 1},
        )
    )
    config |= {"critic_learning_rate": 1e-2, "reward_kl_beta": 0.01, "epochs_per_step": 2}
    config["critic"] = {"options": {"lora": {"rank": 4}}}
    result = nemo_rl.PPOTrainer(config).fit(rows, a_digit)
    rewards = [entry["reward/mean"] for entry in result.history]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    assert result.history[0]["train/reward_kl"] == pytest.approx(0.0, abs=1e-6)
    assert result.history[-1]["train/reward_kl"] > 0
    squared = [entry["train/critic/squared_error"] for entry in result.history]
    assert min(squared[-3:]) < 0.5 * squared[0]
    (saved,) = (result.run_dir / "checkpoints").glob("*/critic/*.pt")
    names = sealed_file.read(saved)["weights"].keys()
    assert "score.weight" in names and all(".lora_" in name or name == "score.weight" for name in names)


def test_an_adapted_reward_model_is_a_reward(tiny, rows, base):
    pairs = [{"prompt": f"{a}+{b}=", "chosen": "1", "rejected": "x"} for a in range(5) for b in range(5)]
    config = settings_of(tiny, base, max_steps=15, batch_size=25)
    result = nemo_rl.RewardModelTrainer(config).fit(pairs)
    assert result.history[-1]["train/accuracy"] == 1.0
    assert (result.model_path / "adapter_model.safetensors").is_file()
    scored = tiny(model=base, max_steps=1, run_dir=config["run_dir"] + "-grpo", generation={"max_new_tokens": 1})
    scored |= {"reward": {"name": "reward_model", "options": {"model": str(result.model_path), "device": "cpu"}}}
    seen: dict[str, list[float]] = {"1": [], "x": []}

    class Look(nemo_rl.Callback):
        def on_rollouts(self, run, groups):
            for rollout in (r for group in groups for r in group.rollouts):
                seen.setdefault(rollout.messages[-1]["content"], []).append(rollout.reward)

    nemo_rl.GRPOTrainer(scored).fit(rows, callbacks=[Look()])
    assert min(seen["1"]) > max(seen["x"])


def test_distillation_leaves_the_teacher_without_adapters(tiny, rows, base, tmp_path):
    """The teacher has the policy's options, and is yet the model that its folder holds: base and adapter."""
    answers = [{"prompt": row["prompt"], "response": "1"} for row in rows]
    teacher = nemo_rl.SFTTrainer(settings_of(tiny, base, max_steps=30, batch_size=25)).fit(answers).model_path
    config = with_lora(tiny(model=base, max_steps=12, num_prompts_per_step=25, run_dir=str(tmp_path / "student")))
    config |= {"num_generations_per_prompt": 1, "learning_rate": 1e-2, "teacher": {"model_name": str(teacher)}}
    config["generation"] = {"max_new_tokens": 1}
    history = nemo_rl.DistillationTrainer(config).fit(rows).history
    assert history[0]["train/divergence"] > 0.3
    assert history[-1]["train/divergence"] < 0.25 * history[0]["train/divergence"]


def test_eval_takes_the_folder_of_an_adapter(tiny, rows, base, tmp_path):
    """The engine samples from base and adapter together: what was learned is answered; also after another save."""
    answers = [{"prompt": row["prompt"], "answer": "1", "response": "1"} for row in rows]
    found = nemo_rl.SFTTrainer(settings_of(tiny, base, max_steps=30, batch_size=25)).fit(answers).model_path
    config = {**tiny(model=str(found), generation={"max_new_tokens": 1}), "run_dir": str(tmp_path / "eval")}
    reward = {"reward_fn": lambda response, answer: float(response == answer)}
    assert nemo_rl.GRPOTrainer(config).evaluate(answers, **reward).metrics["accuracy"] == 1.0
    config["model"] = base
    assert nemo_rl.GRPOTrainer(config).evaluate(answers, **reward).metrics["accuracy"] < 1.0
