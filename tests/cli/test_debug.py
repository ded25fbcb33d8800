"""Who is to blame and what ran when: `--debug`, `debug.jsonl`, and errors that begin with the plugin."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch

from nemo_rl_core.cli import main
from nemo_rl_core.registry import Registry, _registry
from nemo_rl_core.testing.site import PluginSite

SOURCE = """
    import os
    from attrs import frozen
    from nemo_rl_core.protocols.environment import SingleTurnEnvironment
    from nemo_rl_core.protocols.loss import LossSums
    from nemo_rl_core.registry import get_registry

    FAIL = os.environ.get("FAIL_AT", "")

    def fail(place):
        if os.environ.get("FAIL_AT") == place:
            raise {"key": KeyError, "dataset": OSError}.get(place, ValueError)(f"broken {place}")

    class Env(SingleTurnEnvironment):
        async def score(self, task, response):
            fail("environment")
            return float(len(response) % 2)

    class Loss:
        denominator = "tokens"
        needs = frozenset({"logprobs"})
        def __call__(self, outputs, batch):
            fail("loss")
            fail("key")
            if os.environ.get("FAIL_AT") == "type":
                return outputs.logprobs.sum()
            mask = batch["loss_mask"]
            return LossSums(-(outputs.logprobs * batch["advantages"]).masked_fill(~mask, 0.0).sum())

    def advantages(config):
        def estimate(batch):
            fail("advantages")
            r = batch["rewards"]
            return batch.expand_to_tokens(r - r.mean()) * batch["loss_mask"]
        return estimate

    def reward(response):
        fail("reward")
        return float(len(response) % 2)

    class Rows:
        config_class = dict
        def __init__(self, config): ...
        def load(self):
            fail("dataset")
            return [{"prompt": f"{a}+1="} for a in range(4)]

    class Hooks:
        critical = True
        def on_step_end(self, run, metrics):
            fail("hook")

    class Sink:
        config_class = dict
        def __init__(self, config): ...
        def start(self, run_name, run_dir, config): ...
        def log(self, metrics, *, step):
            fail("logger")
        def finish(self, status): ...
"""

ENTRIES = {
    "environments": {"blame_env": "blame_mod:Env"},
    "losses": {"blame_loss": "blame_mod:Loss"},
    "advantages": {"blame_adv": "blame_mod:advantages"},
    "rewards": {"blame_reward": "blame_mod:reward"},
    "datasets": {"blame_rows": "blame_mod:Rows"},
    "loggers": {"blame_sink": "blame_mod:Sink"},
    "hooks": {"blame_hooks": "blame_mod:Hooks"},
}

CONFIG = {
    "algorithm": "grpo",
    "model": "scratch:qwen2-tiny",
    "num_prompts_per_step": 2,
    "num_generations_per_prompt": 2,
    "max_steps": 1,
    "policy": {"max_sequence_length": 24},
    "generation": {"max_new_tokens": 2},
    "logging": {"progress": "none", "loggers": ["blame_sink"]},
    "checkpointing": {"enabled": False},
    "data": {"train": {"source": "blame_rows"}},
    "environment": "blame_env",
    "loss": "blame_loss",
    "advantage": "blame_adv",
    "run_dir": "run",
}


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """`nemo-rl train` in this process, with the plugin `blame-dist 1.2` installed: (status, stderr)."""
    torch.set_num_threads(1)
    folder = tmp_path / "site"
    folder.mkdir()
    PluginSite(folder).install("blame-dist", "1.2", entry_points=ENTRIES, modules={"blame_mod": SOURCE})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("NEMO_RL_DEBUG", "")
    monkeypatch.setattr(_registry, "_registry", Registry())
    level = logging.getLogger("nemo_rl_core.debug").level

    def run(*arguments: str, fail_at: str = "", before: tuple[str, ...] = ()) -> tuple[int, str]:
        monkeypatch.setenv("FAIL_AT", fail_at)
        status = main([*before, "train", "config.json", *arguments])
        return status, capsys.readouterr().err

    yield run
    logging.getLogger("nemo_rl_core.debug").setLevel(level)
    sys.modules.pop("blame_mod", None)


@pytest.mark.parametrize(
    ("fail_at", "overrides", "status", "first"),
    [
        ("loss", (), 70, "plugin blame_loss 1.2 (dist blame-dist), loss __call__: ValueError: broken loss"),
        ("key", (), 70, "plugin blame_loss 1.2 (dist blame-dist), loss __call__: KeyError: 'broken key'"),
        (
            "type",
            (),
            70,
            "plugin blame_loss 1.2 (dist blame-dist), loss __call__: TypeError: it returned Tensor, not a",
        ),
        ("advantages", (), 70, "plugin blame_adv 1.2 (dist blame-dist), advantage estimator"),
        ("environment", (), 1, "plugin blame_env 1.2 (dist blame-dist), environment step: ValueError: broken env"),
        (
            "reward",
            ("environment=null", "reward=blame_reward"),
            1,
            "plugin blame_reward 1.2 (dist blame-dist), reward call: RewardError: reward reward raised ValueError",
        ),
        ("dataset", (), 70, "plugin blame_rows 1.2 (dist blame-dist), dataset source load: OSError: broken dataset"),
        ("hook", (), 70, "plugin blame_hooks 1.2 (dist blame-dist), hook on_step_end: ValueError: broken hook"),
    ],
)
def test_an_error_begins_with_the_plugin(train, fail_at, overrides, status, first):
    found, err = train(*overrides, fail_at=fail_at)
    assert err.splitlines()[0].startswith(f"error: {first}"), err
    assert found == status
    assert "Traceback" not in err
    assert err.count("(dist blame-dist)") == (1 if status == 70 else 2)  # of rollouts the counts follow


def test_the_traceback_is_shown_with_debug_only(train):
    _, err = train(fail_at="loss", before=("--debug",))
    assert "Traceback" in err and 'fail("loss")' in err
    assert "ValueError: plugin blame_loss 1.2 (dist blame-dist), loss __call__: broken loss" in err


def test_a_logger_that_fails_is_named_and_the_run_goes_on(train, caplog):
    status, _ = train(fail_at="logger")
    assert status == 0
    assert "plugin blame_sink 1.2 (dist blame-dist), logger log: broken logger" in caplog.text


@pytest.mark.parametrize("arguments", [(("--debug",), ()), ((), ("--debug",))], ids=["global", "of train"])
def test_debug_writes_what_ran_when(train, tmp_path, arguments, caplog):
    before, after = arguments
    assert train(*after, before=before)[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "debug.jsonl").read_text().splitlines()]
    assert {row["process"] for row in rows} == {"driver"}
    assert [row["number"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(row["seconds"] >= 0 and row["time"] > 1e9 and row["error"] is None for row in rows)
    own = [(r["event"], r["kind"], r["name"], r["call"]) for r in rows if r["distribution"] == "blame-dist"]
    assert {r["version"] for r in rows if r["distribution"] == "blame-dist"} == {"1.2"}
    expected = [
        ("import", "losses", "blame_loss", "import"),
        ("made", "losses", "blame_loss", "__init__"),
        ("call", "datasets", "blame_rows", "load"),
        ("made", "environments", "blame_env", "__init__"),
        ("call", "environments", "blame_env", "step"),
        ("call", "losses", "blame_loss", "__call__"),
        ("hook", "hook", "blame_hooks", "on_step_end"),
        ("call", "loggers", "blame_sink", "finish"),
    ]
    places = [own.index(event) for event in expected]
    assert places == sorted(places), own
    assert own.count(("call", "environments", "blame_env", "step")) == 4  # every rollout, in the file only
    logged = [r.getMessage() for r in caplog.records if r.name == "nemo_rl_core.debug"]
    assert any(text.startswith("call: plugin blame_loss 1.2 (dist blame-dist), loss __call__ ") for text in logged)
    assert not any("environment step" in text for text in logged)


def test_nothing_is_written_without_debug(train, tmp_path):
    assert train()[0] == 0
    assert not (tmp_path / "run" / "debug.jsonl").exists()


def test_debug_in_python_is_over_when_the_run_is(train, tmp_path, monkeypatch):
    import os

    from nemo_rl_core.training.trainer import Trainer

    monkeypatch.delenv("NEMO_RL_DEBUG")
    Trainer("config.json").fit(debug=True)
    size = (tmp_path / "run" / "debug.jsonl").stat().st_size
    assert size and "NEMO_RL_DEBUG" not in os.environ
    Trainer("config.json").fit()
    assert (tmp_path / "run" / "debug.jsonl").stat().st_size == size
