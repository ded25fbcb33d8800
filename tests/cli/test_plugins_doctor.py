"""`nemo-rl plugins doctor`: each fault with its fix; a healthy installation has none."""

from __future__ import annotations

import json

import pytest

from nemo_rl_core.registry import KINDS, Registry
from nemo_rl_core.registry.explaining._diagnosis import compare_nodes, diagnose, reported_nodes
from nemo_rl_core.testing.site import PluginSite

REWARD = "def r(response):\n    return 1.0\n"


@pytest.fixture
def site(tmp_path, monkeypatch) -> PluginSite:
    """Only what a test installs: the distributions of this environment are not looked at."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return PluginSite(folder)


def findings(site: PluginSite, *names: str, load: bool = True) -> list:
    return diagnose(Registry(allow=names), load=load)


def only(found: list):
    (finding,) = found
    assert finding.fix
    return finding


def test_a_sound_plugin_is_no_finding(site):
    site.install("ok-dist", entry_points={"rewards": {"r": "ok_pkg:r"}}, modules={"ok_pkg": REWARD})
    assert findings(site, "ok-dist") == []


def test_conflict(site):
    for name in ("one-dist", "two-dist"):
        package = name.replace("-", "_")
        site.install(name, entry_points={"rewards": {"same": f"{package}:r"}}, modules={package: REWARD})
    finding = only(findings(site, "one-dist", "two-dist"))
    assert (finding.problem, finding.subject) == ("conflict", "reward same")
    assert "one-dist:same" in finding.message and "two-dist:same" in finding.message
    assert "plugins: {same: 'one-dist:same'}" in finding.fix


def test_broken_is_found_by_importing_only(site):
    site.install(
        "bad-dist", entry_points={"rewards": {"bad": "bad_pkg:r"}}, modules={"bad_pkg": "import nonexistent_x"}
    )
    assert findings(site, "bad-dist", load=False) == []
    finding = only(findings(site, "bad-dist"))
    assert finding.problem == "broken" and "nonexistent_x" in finding.message
    assert "NEMO_RL_DISABLE_PLUGINS=bad-dist" in finding.fix


def test_incompatible_with_this_core(site):
    site.install("new-dist", entry_points={"rewards": {"n": "new_pkg:r"}}, requires=["nemo-rl-core>=99"],
                 modules={"new_pkg": REWARD})  # fmt: skip
    finding = only(findings(site, "new-dist", load=False))
    assert finding.problem == "incompatible" and "nemo-rl-core>=99" in finding.message


def test_misplaced_group(site):
    site.install("mis-dist", entry_points={"reward": {"m": "mis_pkg:r"}}, modules={"mis_pkg": REWARD})
    finding = only(findings(site, "mis-dist"))
    assert finding.problem == "misplaced" and "did you mean [nemo_rl.rewards]?" in finding.message


def test_missing_and_wrong_requirements(site):
    requires = ["nonexistent-thing>=2; python_version>='3'", "attrs>=9999", "never; python_version<'3'"]
    site.install("req-dist", entry_points={"rewards": {"q": "req_pkg:r"}}, modules={"req_pkg": REWARD},
                 requires=requires)  # fmt: skip
    found = findings(site, "req-dist")
    assert [f.problem for f in found] == ["missing requirement"] * 2
    assert "nonexistent-thing>=2 (not installed)" in found[0].message
    assert found[0].fix == "pip install 'nonexistent-thing>=2'"
    assert "attrs>=9999 (found " in found[1].message


def test_a_missing_extra_is_a_note(site):
    requires = ['nonexistent-thing; extra == "plots"', 'attrs; extra == "there"']
    site.install(
        "ext-dist", entry_points={"rewards": {"e": "ext_pkg:r"}}, modules={"ext_pkg": REWARD}, requires=requires
    )
    finding = only(findings(site, "ext-dist"))
    assert (finding.problem, finding.severity, finding.subject) == ("missing extra", "note", "ext-dist[plots]")
    assert finding.fix.startswith("pip install 'ext-dist[plots]'")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("raise ValueError('at import')", "at import"),
        ("def on_step_edn(run):\n    pass", "Did you mean 'on_step_end'?"),
        ("def nemo_rl_rewards():\n    raise ValueError('when asked')", "nemo_rl_rewards raised ValueError: when asked"),
    ],
)
def test_hook_plugins_that_fail(site, source, told):
    module = f"hook_pkg_{abs(hash(source))}"
    site.install("hook-dist", entry_points={"hooks": {"h": module}}, modules={module: source})
    finding = only(findings(site, "hook-dist"))
    assert finding.problem == "hook plugin" and told in finding.message
    assert "NEMO_RL_DISABLE_PLUGINS=hook-dist" in finding.fix


# -- other machines -----------------------------------------------------------------------------------------


@pytest.fixture
def registry(site) -> Registry:
    site.install("x-dist", "1.0", entry_points={"rewards": {"x": "x_pkg:r"}}, modules={"x_pkg": REWARD})
    site.install("y-dist", "1.0", entry_points={"rewards": {"y": "x_pkg:r"}})
    return Registry(allow=["x-dist", "y-dist"])


def listing(registry: Registry) -> list[dict]:
    rows = registry.manifest(registry.entries())
    return [{**row, "state": "found"} for row in rows]


def told(differences) -> list[tuple[str, str, str, str]]:
    return [(d.node, d.plugin, d.found, d.expected) for d in differences]


def test_an_equal_node_is_no_difference(registry):
    assert compare_nodes(registry, {"n": listing(registry)}) == []


def test_nodes_that_differ(registry):
    rows = [row for row in listing(registry) if row["distribution"] != "y-dist"]
    older = [{**row, "version": "0.9"} if row["distribution"] == "x-dist" else row for row in rows]
    extra = [*older, {**rows[-1], "kind": "rewards", "name": "z", "distribution": "z-dist", "version": "4"}]
    assert told(compare_nodes(registry, {"n": extra})) == [
        ("n", "x-dist", "0.9", "1.0"),
        ("n", "y-dist", "not installed", "1.0"),
        ("n", "z-dist", "4", "not installed"),
    ]


def test_a_plugin_disabled_there_is_told(registry):
    rows = [{**row, "state": "disabled"} if row["name"] == "x" else row for row in listing(registry)]
    assert told(compare_nodes(registry, {"n": rows})) == [("n", "x-dist", "disabled", "1.0")]


def test_a_runs_manifest_is_no_full_listing(registry):
    rows = [row for row in registry.manifest(registry.entries()) if row["distribution"] == "x-dist"]
    assert compare_nodes(registry, {"run": rows}) == []


def test_equal_versions_may_still_differ(registry):
    rows = [{**row, "api_version": 2} if row["name"] == "x" else row for row in listing(registry)]
    assert told(compare_nodes(registry, {"n": rows})) == [("n", "x-dist (rewards x)", "API version 2", "API version 1")]


def test_a_launcher_plugin_reports_its_nodes(site):
    source = "def nemo_rl_node_manifests():\n    return {'node-a': [], 'node-b': []}\n"
    site.install("cluster-dist", entry_points={"hooks": {"c": "cluster_pkg"}}, modules={"cluster_pkg": source})
    assert set(reported_nodes(Registry(allow=["cluster-dist"]))) == {"node-a", "node-b"}


def test_the_command(cli, tmp_path):
    allowed = {"NEMO_RL_PLUGINS": "good-dist"}
    cli.site.install("good-dist", "1.0", entry_points={"rewards": {"g": "good_pkg:r"}}, modules={"good_pkg": REWARD})
    done = cli("plugins", "doctor", **allowed)
    assert done.returncode == 0 and "no problem(s)" in done.stdout, done.stderr
    rows = json.loads(cli("plugins", "list", "--json", **allowed).stdout)
    other = [{**row, "version": "0.5"} if row["distribution"] == "good-dist" else row for row in rows]
    (tmp_path / "node7.json").write_text(json.dumps(other))
    done = cli("plugins", "doctor", "--against", str(tmp_path / "node7.json"), **allowed)
    assert done.returncode == 3
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("node7"))
    assert line.split() == ["node7", "good-dist", "0.5", "1.0"]
    found = json.loads(cli("plugins", "doctor", "--against", str(tmp_path / "node7.json"), "--json", **allowed).stdout)
    assert not found["healthy"] and found["nodes"][0]["node"] == "node7"
    (tmp_path / "bad.json").write_text("{}")
    done = cli("plugins", "doctor", "--against", str(tmp_path / "bad.json"), **allowed)
    assert done.returncode == 3 and "nemo-rl plugins list --json" in done.stderr
    assert len(KINDS) == 15
