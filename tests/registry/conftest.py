from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_rl_core.registry import Registry, _registry
from nemo_rl_core.testing.site import PluginSite


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PluginSite]:
    """An empty site first on `sys.path`; modules imported from it are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield PluginSite(folder)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry of its own, which `get_registry` returns during the test."""
    for name in ("NEMO_RL_PLUGINS", "NEMO_RL_DISABLE_PLUGINS", "NEMO_RL_STRICT_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    own = Registry()
    monkeypatch.setattr(_registry, "_registry", own)
    return own


@pytest.fixture
def cli(site: PluginSite):
    """`cli("plugins", "list")` runs the command line in a fresh process; `cli.site` installs plugins there."""

    class CommandLine:
        def __call__(self, *arguments: str, **env: str):
            return site.run("-m", "nemo_rl_core.cli", *arguments, env=env)

    CommandLine.site = site
    return CommandLine()
