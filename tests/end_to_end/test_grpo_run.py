"""GRPO runs through the public API: what happens step by step, and what a user sees when something is off."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

import nemo_rl
from nemo_rl_core.errors import CheckpointError, ConfigError, EnvironmentFailure, InvariantViolation
from nemo_rl_core.records.jsonl import read_groups
from nemo_rl_core.training.reporting.record import read_metrics


def first_letter(response: str) -> float:
    """A reward that a random model already earns now and then: a digit anywhere in the response."""
    return float(any(c.isdigit() for c in response))


def test_the_reward_rises(tiny, rows):
    config = tiny(max_steps=25, num_prompts_per_step=8, num_generations_per_prompt=8, learning_rate=3e-3)
    result = nemo_rl.GRPOTrainer(config).fit(rows, first_letter)
    rewards = [entry["reward/mean"] for entry in result.history]
    assert result.status == "completed"
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_five_lines_as_in_the_requirements(tmp_path, rows):
    trainer = nemo_rl.GRPOTrainer.from_pretrained(
        "scratch:qwen2-tiny",
        num_prompts_per_step=2,
        num_generations_per_prompt=2,
        max_steps=1,
        run_dir=str(tmp_path),
        policy={"max_sequence_length": 32},
    )
    result = trainer.fit(dataset=rows, reward_fn=lambda prompt, response: float(len(response) > 0))
    assert result.step == 1


def test_an_engine_of_another_precision_gets_the_weights_cast(tiny, rows):
    config = tiny(max_steps=2, policy={"max_sequence_length": 32, "precision": "float32"})
    config["generation"]["precision"] = "bfloat16"
    result = nemo_rl.GRPOTrainer(config).fit(rows, first_letter)  # fingerprints are compared after each refit
    assert result.status == "completed"
    assert result.step == 2


def test_config_objects_as_in_the_requirements(tmp_path, rows):
    from nemo_rl.config import ClusterConfig, GRPOConfig, PolicyConfig

    config = GRPOConfig(
        policy=PolicyConfig(
            model_name="scratch:qwen2-tiny", precision="bfloat16", backend="dtensor", max_sequence_length=32
        ),
        cluster=ClusterConfig.auto_detect(),
        num_prompts_per_step=2,
        num_generations_per_prompt=2,
        max_steps=1,
        run_dir=str(tmp_path),
    )
    result = nemo_rl.GRPOTrainer(config).fit(train_dataset=rows, reward_fn=first_letter)
    assert math.isfinite(result.metrics["train/loss"])


def test_train_is_one_call(tmp_path, rows):
    result = nemo_rl.train(
        "scratch:qwen2-tiny",
        rows,
        first_letter,
        max_steps=1,
        num_prompts_per_step=2,
        num_generations_per_prompt=2,
        run_dir=str(tmp_path),
        **{"policy.max_sequence_length": 32},
    )
    assert result.model_path is not None
    assert (result.model_path / "model.safetensors").is_file()


def test_the_run_folder_tells_the_whole_story(tiny, rows):
    result = nemo_rl.GRPOTrainer(tiny()).fit(rows, first_letter)
    metrics = read_metrics(result.run_dir)
    assert [entry["step"] for entry in metrics] == [1, 2, 3]
    groups = read_groups(result.run_dir / "rollouts" / "step_2.jsonl")
    assert [g.group_id for g in groups] == [4, 5, 6, 7]
    assert [r.index for g in groups for r in g.rollouts] == [0, 1, 2, 3] * 4
    kinds = {row["kind"] for row in json.loads((result.run_dir / "manifest.json").read_text())}
    assert {"algorithms", "losses", "advantages", "training_backends", "generation_backends"} <= kinds
    assert json.loads((result.run_dir / "config.json").read_text())["num_prompts_per_step"] == 4


def test_on_policy_the_ratio_is_one_and_engine_and_trainer_agree(tiny, rows):
    for entry in nemo_rl.GRPOTrainer(tiny()).fit(rows, first_letter).history:
        assert entry["train/probs_ratio"] == pytest.approx(1.0, abs=1e-6)
        assert entry["train/clip_fraction"] == 0.0
        assert entry["train/token_mult_prob_error"] == pytest.approx(1.0, abs=1e-4)


def test_two_runs_of_one_seed_are_equal_bit_for_bit(tiny, rows, tmp_path):
    models = []
    for name in ("one", "two"):
        result = nemo_rl.GRPOTrainer(tiny(run_dir=str(tmp_path / name))).fit(rows, first_letter)
        models.append((result.model_path / "model.safetensors").read_bytes())
    assert models[0] == models[1]


def test_hooks_come_in_order_and_see_the_run(tiny, rows):
    seen = []

    class Watch(nemo_rl.Callback):
        def on_run_start(self, run):
            seen.append(("start", run.step))

        def on_refit(self, version):
            seen.append(("refit", version))

        def on_rollouts(self, groups):
            seen.append(("rollouts", len(groups)))

        def on_batch(self, batch):
            seen.append(("batch", "advantages" in batch))

        def on_train_step(self, metrics):
            seen.append(("train", "train/loss" in metrics))

        def on_step_end(self, run, metrics):
            seen.append(("end", run.step))
            run.stop_requested = run.step == 1

        def on_checkpoint(self, path):
            seen.append(("checkpoint", path.name))

        def on_run_end(self, status):
            seen.append(("finish", status))

    result = nemo_rl.GRPOTrainer(tiny()).fit(rows, first_letter, callbacks=[Watch()])
    assert result.step == 1
    assert seen == [
        ("start", 0),
        ("refit", 0),
        ("rollouts", 4),
        ("batch", True),
        ("train", True),
        ("end", 1),
        ("checkpoint", "step_1"),
        ("finish", "completed"),
    ]


def test_validation_samples_held_out_prompts(tiny, rows):
    config = tiny(validation={"every": 2, "at_start": True, "max_samples": 3, "num_generations_per_prompt": 2})
    result = nemo_rl.GRPOTrainer(config).fit(rows, first_letter, validation_dataset=rows[:5])
    validated = [entry["step"] for entry in result.history if "validation/accuracy" in entry]
    assert validated == [0, 2]
    assert result.history[0]["validation/num_samples"] == 3


def test_the_kl_term_starts_at_zero_and_then_holds_the_policy(tiny, rows):
    config = tiny(loss={"name": "clipped_pg", "options": {"reference_kl_beta": 0.5}})
    history = nemo_rl.GRPOTrainer(config).fit(rows, first_letter).history
    assert history[0]["train/kl_penalty"] == pytest.approx(0.0, abs=1e-6)
    assert history[-1]["train/kl_penalty"] > 0.0


def test_several_updates_per_step_use_the_old_logprobs(tiny, rows):
    result = nemo_rl.GRPOTrainer(tiny(updates_per_step=2, learning_rate=1e-2)).fit(rows, first_letter)
    assert "timing/logprobs" in result.history[0]
    assert abs(result.history[-1]["train/probs_ratio"] - 1.0) > 1e-6


def test_dynamic_sampling_trains_only_on_groups_with_a_signal(tiny, rows):
    kept = []

    class Watch(nemo_rl.Callback):
        critical = True

        def on_rollouts(self, groups):
            kept.extend(groups)

    config = tiny(dynamic_sampling={"enabled": True, "max_batches": 20})
    nemo_rl.GRPOTrainer(config).fit(rows, first_letter, callbacks=[Watch()])
    assert len(kept) == 12
    assert all(len(set(group.rewards)) > 1 for group in kept)


# -- bad input -----------------------------------------------------------------------------------------


def test_a_reward_that_sometimes_fails_costs_only_those_rollouts(tiny, rows, caplog):
    def reward(response, answer):
        if answer == "0":
            raise ValueError("no such answer")
        return float(len(response))

    config = tiny(num_prompts_per_step=25, max_steps=1)
    result = nemo_rl.GRPOTrainer(config).fit(rows, reward)
    assert result.metrics["rollouts/failed_fraction"] == pytest.approx(
        1 / 26
    )  # one more prompt is sampled in its place
    assert "4 of 104 rollouts failed" in caplog.text
    assert "no such answer" in caplog.text


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (lambda response: 1 / 0, "division by zero"),
        (lambda response: float("nan"), "nan"),
        (lambda response: None, "None"),
        (lambda response: "good", "good"),
        (lambda response, solution: 1.0, "solution"),
    ],
)
def test_a_reward_that_always_fails_stops_the_run_with_its_words(tiny, rows, reward, said):
    with pytest.raises((EnvironmentFailure, ConfigError), match=said):
        nemo_rl.GRPOTrainer(tiny()).fit(rows, reward)


def test_a_reward_that_hangs_is_killed_at_its_deadline(tiny, rows):
    def reward(answer):
        if answer == "0":
            time.sleep(600)
        return 1.0

    config = tiny(num_prompts_per_step=25, max_steps=1, rollouts={"reward_timeout_s": 1.0})
    result = nemo_rl.GRPOTrainer(config).fit(rows, reward)
    assert result.metrics["rollouts/failed_fraction"] == pytest.approx(
        1 / 26
    )  # one more prompt is sampled in its place


def test_without_a_reward_the_error_says_what_to_pass(tiny, rows):
    with pytest.raises(ConfigError, match="Pass reward_fn="):
        nemo_rl.GRPOTrainer(tiny()).fit(rows)


def test_a_prompt_longer_than_the_context_is_a_recorded_failure(tiny, rows):
    rows[3]["prompt"] = "9" * 100
    result = nemo_rl.GRPOTrainer(tiny(num_prompts_per_step=25, max_steps=1)).fit(rows, first_letter)
    assert result.metrics["rollouts/failed_fraction"] == pytest.approx(
        1 / 26
    )  # one more prompt is sampled in its place


def test_an_empty_completion_is_scored_and_trained(tiny, rows):
    config = tiny(generation={"stop_token_ids": list(range(104))}, max_steps=1)  # every token ends at once
    result = nemo_rl.GRPOTrainer(config).fit(rows, lambda response: float(len(response)))
    assert result.metrics["rollouts/response_tokens_max"] == 1.0
    assert math.isfinite(result.metrics["train/loss"])


def test_an_engine_that_samples_from_other_weights_is_caught(tiny, rows):
    from nemo_rl_plugins_torch_engine.backend import TorchEngine

    class Stale(TorchEngine):
        def update_weights(self, version, tensors, *, share=False):
            super().update_weights(version, ((name, t.clone() + 0.5) for name, t in tensors), share=False)

    with pytest.raises(InvariantViolation, match="fingerprint"):
        nemo_rl.GRPOTrainer(tiny(generation={"backend": Stale})).fit(rows, first_letter)


def test_a_trainer_at_another_temperature_is_caught(tiny, rows):
    from nemo_rl_plugins_torch_engine.backend import TorchEngine

    class Hot(TorchEngine):
        async def generate(self, request):
            completion = await super().generate(request)
            return nemo_rl_core_evolve(completion, logprobs=[x - 2.0 for x in completion.logprobs])

    from attrs import evolve as nemo_rl_core_evolve

    with pytest.raises(InvariantViolation, match="mismatch_abort"):
        nemo_rl.GRPOTrainer(tiny(generation={"backend": Hot})).fit(rows, first_letter)


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(tiny, rows):
    class Poison(nemo_rl.Callback):
        critical = True

        def on_batch(self, run, batch):
            if run.step == 1:
                batch.tokens["advantages"] = torch.full_like(batch["advantages"], float("nan"))

    config = tiny(checkpointing={"every": 1})
    with pytest.raises(InvariantViolation):
        nemo_rl.GRPOTrainer(config).fit(rows, first_letter, callbacks=[Poison()])
    result = nemo_rl.GRPOTrainer(config).fit(rows, first_letter)  # resumes from step 1
    assert result.step == 3


def test_a_dataset_smaller_than_a_step_says_so(tiny, rows):
    from nemo_rl_core.errors import DataError

    with pytest.raises(DataError):
        nemo_rl.GRPOTrainer(tiny(num_prompts_per_step=100, max_epochs=1)).fit(rows, first_letter)


def test_another_algorithms_checkpoint_is_refused(tiny, rows, tmp_path):
    nemo_rl.GRPOTrainer(tiny()).fit(rows, first_letter)
    sft = {"model": "scratch:qwen2-tiny", "batch_size": 2, "max_steps": 1, "run_dir": str(tmp_path / "run")}
    pairs = [{"prompt": row["prompt"], "response": row["answer"]} for row in rows]
    with pytest.raises(CheckpointError, match="was written by the algorithm 'grpo'"):
        nemo_rl.SFTTrainer(sft).fit(pairs)
