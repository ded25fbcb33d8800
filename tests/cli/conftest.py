from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rl_core.testing.site import PluginSite


@pytest.fixture
def cli(tmp_path: Path):
    """`cli("plugins", "list")` runs the command line in a fresh process; `cli.site` installs plugins there."""

    class CommandLine:
        site = PluginSite(tmp_path)

        def __call__(self, *arguments: str, **env: str):
            return self.site.run("-m", "nemo_rl_core.cli", *arguments, env=env)

    return CommandLine()
