"""The README shows every option with its default."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rl_core.config.describing.reference import describe
from nemo_rl_plugins_weight_syncs.config import CollectiveConfig, DeltaConfig, DiskConfig, SharedMemoryConfig

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("config_class", [CollectiveConfig, DeltaConfig, DiskConfig, SharedMemoryConfig])
def test_the_readme_tells_every_option(config_class):
    for row in describe(config_class):
        assert row.doc, f"{row.path} has no docstring"
        assert f"| `{row.path}` | {row.allowed} | `{row.default}` | {row.doc} |" in README
