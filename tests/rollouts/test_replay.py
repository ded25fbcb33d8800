"""Train on recorded rollouts without an engine; sample without a trainer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from nemo_rl_core.errors import ConfigError, DataError
from nemo_rl_core.records.jsonl import read_groups, write_groups
from nemo_rl_core.registry import get_registry, register_generation_backend, register_training_backend
from nemo_rl_core.rollouts.recorded import read_recorded
from nemo_rl_core.training.trainer import Trainer

pytestmark = pytest.mark.xdist_group("replay")  # one worker makes what they share

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]
METRICS = ("train/loss", "train/grad_norm", "reward/mean", "rollouts/discarded_groups", "train/token_mult_prob_error")


def reward(response: str) -> float:
    return float(sum(map(ord, response)) % 3 == 0)


def settings(run_dir: Path, **changes) -> dict:
    return {
        "algorithm": "grpo",
        "model": "scratch:qwen2-tiny",
        "learning_rate": 1e-2,
        "num_prompts_per_step": 3,
        "num_generations_per_prompt": 4,
        "max_steps": 3,
        "run_dir": str(run_dir),
        "policy": {"max_sequence_length": 32},
        "generation": {"max_new_tokens": 4},
        "logging": {"progress": "none"},
        "checkpointing": {"enabled": False},
        "dynamic_sampling": {"enabled": True},
        **changes,
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    return Trainer(settings(folder)).fit(ROWS, reward)


@pytest.fixture
def forbidden():
    """Backends that must not be built."""

    class Refuses:
        config_class = dict

        def __init__(self):
            raise AssertionError("built")

        def __getattr__(self, name):
            raise AttributeError(name)

    register_generation_backend("forbidden")(Refuses)
    register_training_backend("forbidden")(Refuses)
    yield "forbidden"
    get_registry().unregister("generation_backends", "forbidden")
    get_registry().unregister("training_backends", "forbidden")


def test_a_replay_takes_the_steps_of_the_run(original, forbidden, tmp_path):
    """Groups that the algorithm refused are in the recording and are refused again; no engine, reward or data."""
    assert any(entry["rollouts/discarded_groups"] for entry in original.history)
    config = settings(tmp_path, generation={"backend": forbidden, "max_new_tokens": 4})
    again = Trainer(config).fit(rollouts=original.run_dir)
    assert again.step == 3
    for mine, theirs in zip(again.history, original.history, strict=True):
        assert {n: mine[n] for n in METRICS} == {n: theirs[n] for n in METRICS}
        assert mine["train/grad_norm"] > 0
    assert not (tmp_path / "rollouts").exists()


def test_it_ends_with_the_recording_and_resumes_in_it(original, tmp_path):
    two = settings(tmp_path, max_steps=2, checkpointing={"enabled": True})
    Trainer(two).fit(rollouts=original.run_dir)
    rest = Trainer({**two, "max_steps": None}).fit(rollouts=original.run_dir)
    assert rest.step == 3
    assert rest.metrics["train/loss"] == original.metrics["train/loss"]


def test_sampling_without_a_trainer_gives_the_first_step(original, forbidden, tmp_path, capsys, monkeypatch):
    """The engine alone samples what the run sampled first; training on that gives the run's first step."""
    from nemo_rl_core.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "score_of_replay.py").write_text(
        "def reward(response):\n    return float(sum(map(ord, response)) % 3 == 0)"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = settings(tmp_path / "run", reward="score_of_replay:reward", data={"train": {"source": "rows.jsonl"}})
    (tmp_path / "config.json").write_text(json.dumps(config))
    generate = ["replay", "generate", "config.json", "--out", "out.jsonl", "--num-prompts"]
    assert main([*generate, "9", "--json", f"policy.backend={forbidden}"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == "out.jsonl"
    sampled = read_groups("out.jsonl")
    recorded = read_groups(original.run_dir / "rollouts" / "step_1.jsonl")
    tokens = [[turn.token_ids for r in group.rollouts for turn in r.segments[0]] for group in sampled]
    assert len(sampled) == 9
    assert tokens[: len(recorded)] == [[t.token_ids for r in g.rollouts for t in r.segments[0]] for g in recorded]
    assert main([*generate, "3"]) == 4 and "--overwrite" in capsys.readouterr().err
    train = ["replay", "train", "config.json", "--rollouts", "out.jsonl", f"generation.backend={forbidden}"]
    assert main([*train, "max_steps=1"]) == 0, capsys.readouterr().err
    (line,) = (tmp_path / "run-replay" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["train/loss"] == original.history[0]["train/loss"]
    sys.modules.pop("score_of_replay", None)


# -- what cannot be replayed ----------------------------------------------------------------------------------


def damaged(original, tmp_path, change) -> Path:
    """The first step's file after `change(groups)` or on its text."""
    groups = read_groups(original.run_dir / "rollouts" / "step_1.jsonl")
    path = tmp_path / "damaged.jsonl"
    write_groups(path, groups)
    text = change(groups, path.read_text())
    if text is None:
        write_groups(path, groups)
    else:
        path.write_text(text)
    return path


def fail_each(groups, text):
    from nemo_rl_core.records.rollout import RolloutError

    for group in groups:
        for rollout in group.rollouts:
            rollout.error = RolloutError(stage="step", type="ValueError", message="x")


def set_turns(**changes):
    def change(groups, text):
        for group in groups:
            for rollout in group.rollouts:
                for turn in rollout.segments[0]:
                    if turn.sampled:
                        for name, value in changes.items():
                            setattr(turn, name, value(turn))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, text: text[: len(text) // 2], r"damaged.jsonl:\d+: not a line of JSON .* the file was cut off"),
        (lambda g, text: '{"prompt": "1+1=", "answer": "2"}\n', "damaged.jsonl:1: this line is JSON but not a rollout"),
        (lambda g, text: "step,reward\n1,2\n", "damaged.jsonl:1: not a line of JSON"),
        (lambda g, text: "", "damaged.jsonl is empty"),
        (lambda g, text: "".join(text.splitlines(keepends=True)[:4]), "One step takes 3 groups, and .* has [01] that"),
        (set_turns(logprobs=lambda t: []), r"rollout '.*': a sampled turn has \d+ tokens and 0 logprobs"),
        (set_turns(logprobs=lambda t: [float("nan")] * len(t.token_ids)), "a logprob is not finite"),
        (
            set_turns(token_ids=lambda t: [99_999] * len(t.token_ids)),
            "holds the token 99999, and the tokenizer .* knows",
        ),
        (
            set_turns(message=lambda t: {"role": "assistant", "content": "as another tokenizer decodes it"}),
            "was recorded with another tokenizer: the tokens of 'as another",
        ),
        (fail_each, "every rollout failed when it was recorded"),
    ],
)
def test_bad_recordings_are_named(original, tmp_path, change, message):
    path = damaged(original, tmp_path, change)
    with pytest.raises(DataError, match=message):
        Trainer(settings(tmp_path / "run")).fit(rollouts=path)


def test_missing_recordings(tmp_path):
    with pytest.raises(DataError, match="holds no recorded rollouts"):
        read_recorded(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_recorded(tmp_path / "none.jsonl")


def test_only_algorithms_of_rollouts_are_replayed(original, tmp_path):
    config = {"algorithm": "sft", "model": "scratch:qwen2-tiny", "max_steps": 1, "run_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match="sft is trained on rows"):
        Trainer({**config, "logging": {"progress": "none"}}).fit(rollouts=original.run_dir)


def test_a_checkpoint_of_a_sampling_run_is_not_continued(original, tmp_path):
    config = settings(tmp_path, max_steps=1, checkpointing={"enabled": True})
    Trainer(config).fit(ROWS, reward)
    with pytest.raises(DataError, match="of a run that sampled its rollouts"):
        Trainer({**config, "max_steps": 2}).fit(rollouts=original.run_dir)
