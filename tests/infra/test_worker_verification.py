"""A worker that lacks a plugin or has another version is refused before it imports anything heavy."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_rl_core.errors import PluginIncompatible
from nemo_rl_core.infra.workers import processes
from nemo_rl_core.infra.workers.local import LocalConfig, LocalLauncher
from nemo_rl_core.protocols.launcher import WorkerSpec
from nemo_rl_core.registry import Registry, _registry, node_differences, worker_rows
from nemo_rl_core.schema import ClusterConfig
from nemo_rl_core.testing.site import PluginSite

WORKER = """
import sys
SEEN = "torch" in sys.modules

class Worker:
    config_class = dict
    capabilities = frozenset()
    def setup(self, config, context): self.rank = context.rank
    def where(self): return self.rank
    def shutdown(self): pass
    def __getattr__(self, name): raise AttributeError(name)
"""
HOST = socket.gethostname()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PluginSite:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    found = PluginSite(folder)
    entry_points = {"training_backends": {"w": "worker_pkg:Worker"}}
    found.install("acme-w", "1.0", entry_points=entry_points, modules={"worker_pkg": WORKER})
    monkeypatch.setattr(_registry, "_registry", Registry())
    yield found
    sys.modules.pop("worker_pkg", None)


@pytest.fixture
def launcher():
    made = LocalLauncher(LocalConfig(start_timeout_s=60.0, failure_grace_s=5.0))
    made.setup(ClusterConfig(device="cpu", cpus_per_node=2))
    yield made
    made.shutdown()


def spec(**changes) -> WorkerSpec:
    ref = _registry.get_registry().resolve("training_backends", "w")
    return WorkerSpec(role="policy", factory=ref, config=None, num_workers=2, **changes)


def table(error: pytest.ExceptionInfo[PluginIncompatible]) -> list[list[str]]:
    lines = str(error.value).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("node"))
    return [line.split("  ") for line in lines[start:-1]]


def cells(error: pytest.ExceptionInfo[PluginIncompatible]) -> list[list[str]]:
    return [[cell.strip() for cell in row if cell.strip()] for row in table(error)]


def test_workers_with_the_same_plugins_start(site, launcher):
    assert launcher.launch(spec()).call("where") == [0, 1]


def test_a_plugin_that_was_upgraded_since_is_named_for_every_worker(site, launcher):
    wanted = spec()
    (site.path / "acme_w-1.0.dist-info").rename(site.path / "acme_w-1.1.dist-info")
    with pytest.raises(PluginIncompatible, match="2 worker processes have other plugins") as error:
        launcher.launch(wanted)
    assert cells(error) == [
        ["node", "plugin", "found", "expected"],
        [f"{HOST} rank 0", "acme-w (training_backends w)", "1.1", "1.0"],
        [f"{HOST} rank 1", "acme-w (training_backends w)", "1.1", "1.0"],
    ]


def test_a_plugin_that_is_not_there_is_named(site, launcher, tmp_path):
    wanted = spec()
    (site.path / "acme_w-1.0.dist-info").rename(tmp_path / "gone")
    with pytest.raises(PluginIncompatible) as error:
        launcher.launch(wanted)
    assert cells(error)[1] == [f"{HOST} rank 0", "acme-w (training_backends w)", "not installed", "1.0"]


HANGS_ONCE = """
import os, time
try:
    os.close(os.open({path!r}, os.O_CREAT | os.O_EXCL))
except FileExistsError:
    pass
else:
    time.sleep(600)
"""


def test_a_worker_that_is_stuck_does_not_hold_back_the_table(site, tmp_path, monkeypatch):
    """One of two never answers and may take the whole `start_timeout_s`; the other's difference is told soon."""
    wanted = spec()
    (site.path / "acme_w-1.0.dist-info").rename(site.path / "acme_w-1.1.dist-info")
    (site.path / "sitecustomize.py").write_text(HANGS_ONCE.format(path=str(tmp_path / "taken")))
    monkeypatch.setenv("PYTHONPATH", str(site.path))
    monkeypatch.setattr(processes, "_VERIFY_GRACE_S", 0.2)
    made = LocalLauncher(LocalConfig(start_timeout_s=3600.0))
    made.setup(ClusterConfig(device="cpu", cpus_per_node=2))
    with pytest.raises(PluginIncompatible) as error:
        made.launch(wanted)
    made.shutdown()
    (row,) = cells(error)[1:]
    assert row[1:] == ["acme-w (training_backends w)", "1.1", "1.0"]


def test_the_table_comes_within_ten_seconds():
    """The longest wait after a first difference, and the time in which the processes are ended."""
    assert processes._VERIFY_GRACE_S <= 5.0


def test_a_worker_whose_pythonpath_has_another_version_is_refused(site, launcher, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    PluginSite(other).install("acme-w", "0.9", entry_points={"training_backends": {"w": "worker_pkg:Worker"}})
    with pytest.raises(PluginIncompatible) as error:
        launcher.launch(spec(env={"PYTHONPATH": str(other)}))
    assert cells(error)[1][2:] == ["0.9", "1.0"]


def test_plugins_of_the_whole_run_are_compared(site, launcher):
    """Also those that a worker meets later, such as the loss that a step brings with it."""
    registry = _registry.get_registry()
    rows = worker_rows(registry.manifest([registry.resolve("training_backends", "w")]))
    absent = {**rows[0], "kind": "losses", "name": "x", "distribution": "acme-loss", "version": "2.0"}
    with pytest.raises(PluginIncompatible) as error:
        launcher.launch(spec(manifest=[*rows, absent]))
    assert cells(error)[1:] == [
        [f"{HOST} rank {rank}", "acme-loss (losses x)", "not installed", "2.0"] for rank in (0, 1)
    ]


PROGRAM = """
import json, pickle, sys
from nemo_rl_core.infra.workers.child import verify

class Connection:
    def send_bytes(self, data):
        self.data = data

connection = Connection()
told = verify(connection, sys.stdin.read())
heavy = sorted({"torch", "transformers", "numpy", "worker_pkg"} & sys.modules.keys())
kind, answer = pickle.loads(connection.data)
print(json.dumps([told, kind, [[d.plugin, d.found, d.expected] for d in answer], heavy]))
"""


def verified(rows: list[dict], path: str) -> list:
    """What a fresh process with `PYTHONPATH=path` answers."""
    env = {**os.environ, "PYTHONPATH": path, "RANK": "3"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(rows), env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_verification_imports_nothing_heavy(site, tmp_path):
    registry = _registry.get_registry()
    rows = worker_rows(registry.manifest([registry.resolve("training_backends", "w")]))
    assert verified(rows, str(site.path)) == [True, "result", [], []]
    empty = tmp_path / "empty"
    empty.mkdir()
    plugin = "acme-w (training_backends w)"
    assert verified(rows, str(empty)) == [True, "result", [[plugin, "not installed", "1.0"]], []]


def test_what_differs_at_equal_versions_is_told(site):
    registry = _registry.get_registry()
    (row,) = worker_rows(registry.manifest([registry.resolve("training_backends", "w")]))
    for changed, found, expected in (
        ({"api_version": 7}, "1.0, API version 1", "1.0, API version 7"),
        ({"value": "worker_pkg:Old"}, "1.0, entry point worker_pkg:Worker", "1.0, entry point worker_pkg:Old"),
        ({"source_hash": "feed"}, None, "1.0, source feed"),
    ):
        (difference,) = node_differences([{**row, **changed}], registry, node="n")
        assert (difference.node, difference.expected) == ("n", expected)
        assert found is None or difference.found == found
    assert pickle.loads(pickle.dumps(difference)) == difference
