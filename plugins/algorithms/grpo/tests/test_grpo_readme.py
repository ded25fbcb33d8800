"""The README shows every setting with its default."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rl_core.config.describing.reference import describe
from nemo_rl_core.schema import RunConfig
from nemo_rl_plugins_grpo import advantage_config, loss_config
from nemo_rl_plugins_grpo.config import GRPOConfig

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMON = {row.path for row in describe(RunConfig)}


CLASSES = [
    GRPOConfig,
    *(getattr(advantage_config, name) for name in advantage_config.__all__),
    *(getattr(loss_config, name) for name in loss_config.__all__),
]


@pytest.mark.parametrize("config_class", CLASSES)
def test_the_readme_tells_every_setting(config_class):
    for row in describe(config_class):
        if row.path not in COMMON:
            assert row.doc, f"{row.path} has no docstring"
            assert f"| `{row.path}` | {row.allowed} | `{row.default}` | {row.doc} |" in README
