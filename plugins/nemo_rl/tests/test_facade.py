"""The facade: cheap to import, complete, and with callbacks that do what they say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import nemo_rl
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.registry import get_registry


def test_importing_it_imports_neither_torch_nor_a_plugin():
    code = (
        "import sys, nemo_rl; heavy = {'torch', 'transformers', 'nemo_rl_plugins_grpo'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    missing = [name for name in nemo_rl.__all__ if getattr(nemo_rl, name, None) is None]
    assert missing == []
    assert set(nemo_rl.__all__) <= set(dir(nemo_rl))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'PPOOTrainer'"):
        nemo_rl.PPOOTrainer


def test_the_default_set_is_named_by_the_facade_alone():
    registry = get_registry()
    assert registry.default("training_backends") == "dtensor"
    assert registry.default("generation_backends") == "torch_engine"


@pytest.fixture
def one_step(tmp_path):
    return {
        "model": "scratch:qwen2-tiny",
        "num_prompts_per_step": 2,
        "num_generations_per_prompt": 2,
        "max_steps": 3,
        "run_dir": str(tmp_path),
        "policy": {"max_sequence_length": 32},
        "generation": {"max_new_tokens": 2},
        "logging": {"progress": "none"},
    }


def test_the_checkpoint_callback_saves_every_so_many_steps(one_step):
    saved = []

    class Watch(nemo_rl.Callback):
        def on_checkpoint(self, path):
            saved.append(path.name)

    rows = [{"prompt": str(i)} for i in range(6)]
    callbacks = [nemo_rl.CheckpointCallback(every=2), Watch()]
    nemo_rl.GRPOTrainer(one_step).fit(rows, lambda response: float(len(response)), callbacks=callbacks)
    assert saved == ["step_2", "step_3"]


def test_a_checkpoint_interval_below_one_is_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        nemo_rl.CheckpointCallback(every=0)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_wandb_is_said_with_the_fix():
    with pytest.raises(ConfigError, match="pip install wandb"):
        nemo_rl.WandbCallback()


def test_a_trainer_refuses_another_algorithms_configuration(one_step):
    with pytest.raises(ConfigError, match="algorithm"):
        nemo_rl.SFTTrainer({**one_step, "algorithm": "grpo"})


def test_evaluate_scores_every_row(one_step):
    metrics = nemo_rl.evaluate(
        "scratch:qwen2-tiny",
        [{"prompt": "1"}, {"prompt": "2"}],
        lambda response: 0.25,
        **{"policy.max_sequence_length": 32, "generation.max_new_tokens": 2},
    )
    assert metrics["accuracy"] == 0.25
    assert metrics["num_samples"] == 2
