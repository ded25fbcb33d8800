"""What a run is made of: shown at its start, in its folder and checkpoints, compared when it is resumed."""

from __future__ import annotations

import json
import logging

import pytest

import nemo_rl
from nemo_rl_core.errors import PluginIncompatible
from nemo_rl_core.registry import KINDS, Registry, _registry, register_reward
from nemo_rl_core.schema.mistakes import InvalidConfig
from nemo_rl_core.testing.site import PluginSite

REWARD = "def digits(response):\n    return float(any(c.isdigit() for c in response))\n"


@pytest.fixture
def site(tmp_path, monkeypatch) -> PluginSite:
    """With a reward of a stranger's distribution, in version 1.0."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    found = PluginSite(folder)
    found.install("acme-r", "1.0", entry_points={"rewards": {"digits": "acme_r:digits"}, "api": {"rewards": "v1"}},
                  modules={"acme_r": REWARD})  # fmt: skip
    monkeypatch.setattr(_registry, "_registry", Registry())
    return found


@pytest.fixture
def run(site, tiny, rows, monkeypatch):
    """`run(max_steps)` starts the run, or goes on with it, as a new process would."""

    def go(max_steps: int, **changes):
        monkeypatch.setattr(_registry, "_registry", Registry())
        changes = {"reward": "digits", "checkpointing": {"every": 1}, **changes}
        return nemo_rl.GRPOTrainer(tiny(max_steps=max_steps, **changes)).fit(rows)

    return go


def upgrade(site: PluginSite) -> None:
    (site.path / "acme_r-1.0.dist-info").rename(site.path / "acme_r-1.1.dist-info")


def test_it_is_shown_written_and_in_the_checkpoint(run, capfd, tmp_path):
    result = run(1, logging={"progress": "lines"})
    shown = capfd.readouterr().err
    (line,) = (line for line in shown.splitlines() if "acme-r 1.0" in line)
    assert line.split() == ["*", "rewards", "digits", "acme-r", "1.0", "acme_r:digits"]
    assert "* third-party plugin" in shown
    assert next(line for line in shown.splitlines() if "nemo-rl-grpo" in line and "algorithms" in line).startswith(" ")
    written = json.loads((result.run_dir / "manifest.json").read_text())
    assert {"algorithms", "losses", "rewards", "launchers", "hooks"} <= {row["kind"] for row in written}
    saved = json.loads((result.checkpoint / "state.json").read_text())["state"]["manifest"]
    assert saved == written


def test_another_version_is_reported_and_the_run_goes_on(run, site, caplog):
    run(1)
    upgrade(site)
    with caplog.at_level(logging.WARNING):
        assert run(2).step == 2
    (text,) = (r.message for r in caplog.records if "plugins have changed" in r.message)
    (line,) = (line for line in text.splitlines() if line.startswith("rewards"))
    assert line.split() == ["rewards", "digits", "version", "1.0", "1.1"]


def test_the_same_plugins_are_not_reported(run, caplog):
    run(1)
    with caplog.at_level(logging.WARNING):
        run(2)
    assert not [r for r in caplog.records if "plugins have changed" in r.message]


def test_another_api_version_is_refused(run, site, monkeypatch):
    run(1)
    info = site.path / "acme_r-1.0.dist-info" / "entry_points.txt"
    info.write_text(info.read_text().replace("rewards = v1", "rewards = v2"))
    monkeypatch.setitem(KINDS, "rewards", KINDS["rewards"]._replace(api_version=2))
    with pytest.raises(PluginIncompatible, match=r"another API version of rewards 'digits'") as error:
        run(2)
    assert "acme-r==1.0" in str(error.value) and "checkpointing.resume=never" in str(error.value)
    assert run(2, checkpointing={"every": 1, "resume": "never"}).step == 2


def test_functions_given_to_fit_and_callbacks_are_named(tiny, rows):
    class Watch(nemo_rl.Callback):
        def on_step_end(self, run):
            pass

    def mine(response):
        return 1.0

    result = nemo_rl.GRPOTrainer(tiny(max_steps=1)).fit(rows, mine, callbacks=[Watch()])
    found = {row["kind"]: row for row in json.loads((result.run_dir / "manifest.json").read_text())}
    assert found["rewards"]["name"] == "mine" and found["rewards"]["defined_in"] == __file__
    assert found["callbacks"]["name"].endswith("Watch") and found["callbacks"]["distribution"] is None


def test_code_that_only_a_script_registered_is_named_when_it_is_not_there(tiny, rows, monkeypatch):
    monkeypatch.setattr(_registry, "_registry", Registry())

    @register_reward("mine")
    def mine(response):
        return 1.0

    settings = tiny(max_steps=1, reward="mine")
    nemo_rl.GRPOTrainer(settings).fit(rows)
    monkeypatch.setattr(_registry, "_registry", Registry())  # a process that has not run the script
    with pytest.raises(InvalidConfig) as error:
        nemo_rl.GRPOTrainer({**settings, "max_steps": 2})
    text = str(error.value)
    assert "'mine' is user code that is not here" in text and f"python {__file__}" in text
