"""The README shows every setting with its default."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rl_core.config.describing.reference import describe
from nemo_rl_core.schema import RunConfig
from nemo_rl_plugins_dpo import config

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMON = {row.path for row in describe(RunConfig)}


@pytest.mark.parametrize("name", config.__all__)
def test_the_readme_tells_every_setting(name):
    for row in describe(getattr(config, name)):
        if row.path not in COMMON:
            assert row.doc, f"{row.path} has no docstring"
            assert f"| `{row.path}` | {row.allowed} | `{row.default}` | {row.doc} |" in README
