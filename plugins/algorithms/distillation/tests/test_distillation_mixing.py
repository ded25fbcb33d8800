"""The share of steps on the student's samples: none, all, or drawn from the seed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.errors import ConfigError, DataError
from nemo_rl_core.testing.scripted_generation import ScriptedGeneration
from nemo_rl_core.training.trainer import Trainer
from nemo_rl_plugins_distillation.teacher_algorithm import takes_rollouts

torch.set_num_threads(1)
pytestmark = pytest.mark.xdist_group("distillation-mixing")


class NoEngine(ScriptedGeneration):
    """A generation backend that must not be made."""

    def __init__(self, *_):
        raise AssertionError("an engine was started")


@pytest.fixture
def run(rows, settings, teacher, tmp_path):
    """The history of a run."""

    def fit(name, algorithm="distillation", data=rows, **changes):
        own = {"batch_size": 25} if algorithm == "off_policy_distillation" else {"num_prompts_per_step": 25}
        config = settings(
            algorithm,
            "scratch:qwen2-tiny",
            tmp_path / name,
            **{"teacher": {"model_name": str(teacher)}, "generation": {"max_new_tokens": 4}, **own, **changes},
        )
        return Trainer(config).fit(data).history

    return fit


def test_a_draw_depends_on_the_seed_and_the_step_alone():
    """Nothing is kept between draws: asked backwards they are the same."""
    steps = range(2000)
    drawn = [takes_rollouts(0.3, seed=1, step=step) for step in steps]
    assert drawn == [takes_rollouts(0.3, seed=1, step=step) for step in reversed(steps)][::-1]
    assert drawn != [takes_rollouts(0.3, seed=2, step=step) for step in steps]
    assert 0.27 < sum(drawn) / len(drawn) < 0.33


def test_a_larger_share_samples_in_every_step_of_a_smaller_one():
    shares = (0.0, 0.2, 0.7, 1.0)
    drawn = [{step for step in range(200) if takes_rollouts(share, seed=3, step=step)} for share in shares]
    assert (len(drawn[0]), len(drawn[-1])) == (0, 200)
    assert all(small < large for small, large in pairwise(drawn))


def test_none_is_off_policy_distillation_without_an_engine(run):
    """The steps are those of off_policy_distillation, and an engine that cannot be made does not matter."""
    engine = {"backend": NoEngine, "max_new_tokens": 4}
    mine = run("none", lmbda=0.0, generation=engine, max_steps=3)
    other = run("other", "off_policy_distillation", max_steps=3)
    assert [step["train/loss"] for step in mine] == [step["train/loss"] for step in other]
    assert not any(name.startswith(("rollouts/", "generation/", "reward/")) for step in mine for name in step)


def test_all_is_on_policy_distillation(run):
    mine, other = run("all", lmbda=1.0, max_steps=2), run("default", max_steps=2)
    assert [step["train/loss"] for step in mine] == [step["train/loss"] for step in other]
    assert all("reward/mean" in step and "train/on_policy" not in step for step in mine)


def test_some_steps_sample_and_the_others_take_the_answers(run):
    history = run("some", lmbda=0.5, max_steps=5)
    drawn = [takes_rollouts(0.5, seed=42, step=step) for step in range(5)]
    assert [step["train/on_policy"] for step in history] == [float(on) for on in drawn]
    assert ["reward/mean" in step for step in history] == drawn
    assert {True, False} == set(drawn)
    assert history[-1]["train/divergence"] < history[0]["train/divergence"]


def test_rows_without_an_answer(run):
    with pytest.raises(DataError, match=r"neither a chat .* nor a prompt with its response"):
        run("missing", data=[{"prompt": "1+1="}] * 25, lmbda=0.5, max_steps=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lmbda": 1.5}, r"lmbda\s+must be <= 1"),
        ({"lmbda": 0.5, "rollouts": {"staleness": 1}}, "nothing is sampled ahead"),
        (
            {"lmbda": 0.5, "loss": "clipped_pg", "advantage": "on_policy_distillation"},
            "a policy gradient needs sampled ones",
        ),
        ({"algorithm": "cross_tokenizer_distillation", "top_k": None}, "the teacher has another tokenizer"),
    ],
)
def test_mistakes(fields, message):
    raw = {"algorithm": "distillation", "model": "scratch:qwen2-tiny", "teacher": {"model_name": "a"}, **fields}
    with pytest.raises(ConfigError, match=message):
        finalize(load_config(raw))
