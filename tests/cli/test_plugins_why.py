"""`nemo-rl plugins why`: every place in order, the winner, the exact reason."""

from __future__ import annotations

import json

import pytest

from nemo_rl_core.errors import PluginError
from nemo_rl_core.registry import Registry, register_reward
from nemo_rl_core.registry.explaining._why import kinds_with, resolution
from nemo_rl_core.testing.site import PluginSite

REWARD = "def r(response):\n    return 1.0\n"
HOOKS = "def nemo_rl_rewards():\n    return {'dynamic': 'a_pkg:r', 'other': 'a_pkg:r'}\n"


@pytest.fixture
def site(tmp_path, monkeypatch) -> PluginSite:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    found = PluginSite(folder)
    entries = {"rewards": {"short": "a_pkg:r", "both": "a_pkg:r"}}
    found.install("a-dist", "1.0", entry_points=entries, modules={"a_pkg": REWARD})
    entries = {"rewards": {"both": "b_pkg:r"}, "hooks": {"b": "b_hooks"}, "losses": {"both": "b_pkg:r"}}
    found.install("b-dist", "2.0", entry_points=entries, modules={"b_pkg": REWARD, "b_hooks": HOOKS})
    found.install("c-dist", "3.0", entry_points={"reward": {"lost": "c_pkg:r"}})
    return found


@pytest.fixture
def registry(site, monkeypatch) -> Registry:
    from nemo_rl_core.registry import _registry

    own = Registry(deny=["z-dist"])
    monkeypatch.setattr(_registry, "_registry", own)
    return own


def places(found) -> list[str]:
    return [step.place for step in found.steps]


def decided(found) -> list[tuple[str, str]]:
    return [(step.place, step.found) for step in found.steps if step.decides]


def test_an_entry_point_wins(registry):
    found = resolution(registry, "rewards", "short")
    first = places(found)
    assert first[:4] == ["override lines", "decorators", "entry points of a-dist 1.0", "entry points of b-dist 2.0"]
    assert first[-2:] == ["provision hooks", "published packages"]
    assert decided(found) == [("entry points of a-dist 1.0", "a_pkg:r")]
    assert found.winner.qualified_name == "a-dist:short"
    assert "not among its 1: both" in found.steps[3].found
    assert "not asked" in found.steps[-2].found


def test_two_providers_are_a_conflict_until_an_override_line_settles_it(registry):
    found = resolution(registry, "rewards", "both")
    assert found.winner is None and decided(found) == []
    assert "is provided by 2" in found.reason
    settled = resolution(registry, "rewards", "both", plugins={"both": "b-dist:both"})
    assert settled.winner.qualified_name == "b-dist:both"
    assert decided(settled) == [("override lines", "plugins: {both: b-dist:both}")]


def test_an_override_line_for_another_kind_is_passed_over(registry):
    found = resolution(registry, "losses", "both", plugins={"both": "a-dist:both"})
    assert "passed over" in found.steps[0].found
    assert decided(found) == [("entry points of b-dist 2.0", "b_pkg:r")]


def test_a_decorator_wins_where_nothing_is_installed_or_by_override(registry):
    @register_reward("own")
    def own(response):
        return 1.0

    assert [place for place, _ in decided(resolution(registry, "rewards", "own"))] == ["decorators"]

    register_reward("short", override=True)(own)
    found = resolution(registry, "rewards", "short")
    assert [place for place, _ in decided(found)] == ["decorators"]
    assert "override=True" in found.steps[1].found


def test_a_provision_hook_wins_when_no_metadata_has_the_name(registry):
    found = resolution(registry, "rewards", "dynamic")
    assert decided(found) == [("hook nemo_rl_rewards of b-dist", "a_pkg:r")]
    assert found.winner.distribution == "b-dist"


def test_names_that_lead_nowhere_say_why(registry):
    near = resolution(registry, "rewards", "shortt")
    assert near.winner is None and "Did you mean 'short'?" in near.reason
    assert "hook plugin(s) asked" in near.steps[-2].found and "2 names, not this one" in near.steps[-2].found
    published = resolution(registry, "losses", "clipped_pg") if not registry.distribution("nemo-rl-grpo") else None
    assert published is None or "pip install nemo-rl-grpo" in published.reason
    misplaced = resolution(registry, "rewards", "lost")
    assert any("did you mean [nemo_rl.rewards]?" in step.found for step in misplaced.steps)


def test_a_disabled_plugin_is_the_reason(site, monkeypatch):
    own = Registry(deny=["a-dist"])
    found = resolution(own, "rewards", "short")
    assert found.winner is None and "NEMO_RL_DISABLE_PLUGINS" in found.reason
    assert any(s.place == "entry points of a-dist 1.0" and "it has the name" in s.found for s in found.steps)
    assert kinds_with(own, "short") == ["rewards"]


def test_full_names_and_import_paths(registry):
    assert decided(resolution(registry, "rewards", "a-dist:short")) == [
        ("full name (dist:name)", "a-dist 1.0 provides both, short")
    ]
    by_path = resolution(registry, "rewards", "a_pkg:r")
    assert [place for place, _ in decided(by_path)] == ["import path (module:attr)"]
    nowhere = resolution(registry, "rewards", "nodist:x")
    assert nowhere.winner is None and decided(nowhere) == []
    assert "neither an installed plugin distribution nor a module" in nowhere.reason


@pytest.mark.parametrize("name", ["short", "both", "dynamic", "nothing", "a-dist:short", "a_pkg:r", "x:y"])
@pytest.mark.parametrize("plugins", [{}, {"both": "a-dist:both"}])
def test_it_tells_what_the_registry_does(registry, name, plugins):
    found = resolution(registry, "rewards", name, plugins=plugins)
    try:
        ref = registry.resolve("rewards", name, plugins=plugins)
    except PluginError as error:
        assert found.winner is None and str(found.error) == str(error) and decided(found) == []
    else:
        assert found.winner == ref and len(decided(found)) == 1


def test_the_command(cli, tmp_path):
    cli.site.install("a-dist", "1.0", entry_points={"rewards": {"only": "boom:r"}}, modules={"boom": "raise OSError"})
    done = cli("plugins", "why", "only")
    assert done.returncode == 0, done.stderr  # the component was not imported
    assert "<- wins" in done.stdout and "=> a-dist:only (a-dist 1.0, boom:r)" in done.stdout
    found = json.loads(cli("plugins", "why", "only", "--json").stdout)
    assert [f["resolved"] for f in found] == ["a-dist:only"]
    done = cli("plugins", "why", "onli", "--kind", "rewards")
    assert done.returncode == 3 and "Did you mean 'only'?" in done.stdout
    done = cli("plugins", "why", "unlikeanything")
    assert done.returncode == 3 and "No kind has a component" in done.stderr
    (tmp_path / "run.yaml").write_text("algorithm: x\nplugins: {only: 'a-dist:only'}\n")
    done = cli("plugins", "why", "only", "--prefer", "only=a-dist:only")
    assert "override lines" in done.stdout and "plugins: {only: a-dist:only}" in done.stdout
    assert cli("plugins", "why", "only", "--prefer", "nonsense").returncode == 2
