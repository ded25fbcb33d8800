"""The README shows every setting with its default."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rl_core.config.describing.reference import describe
from nemo_rl_core.schema import PolicyConfig, RunConfig
from nemo_rl_plugins_ppo.config import ClippedSurrogateConfig, ClippedValueConfig, GAEConfig, PPOConfig

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMON = {row.path for row in describe(RunConfig)}
OF_EVERY_MODEL = {f"critic.{row.path}": row for row in describe(PolicyConfig)}


def own_settings(config_class):
    """The rows of this package; of the critic those that differ from the policy's."""
    for row in describe(config_class):
        same = OF_EVERY_MODEL.get(row.path)
        if row.path not in COMMON and (same is None or (same.default, same.doc) != (row.default, row.doc)):
            yield row


@pytest.mark.parametrize("config_class", [PPOConfig, ClippedSurrogateConfig, ClippedValueConfig, GAEConfig])
def test_the_readme_tells_every_setting(config_class):
    for row in own_settings(config_class):
        assert row.doc, f"{row.path} has no docstring"
        assert f"| `{row.path}` | {row.allowed} | `{row.default}` | {row.doc} |" in README
