"""The README shows every setting with its default."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rl_core.config.describing.reference import describe
from nemo_rl_core.schema import RunConfig
from nemo_rl_plugins_distillation.advantages import OnPolicyDistillationConfig
from nemo_rl_plugins_distillation.config import CrossTokenizerConfig, DistillationConfig, OffPolicyDistillationConfig
from nemo_rl_plugins_distillation.loss_config import (
    DivergenceConfig,
    JensenShannonConfig,
    MixedKLConfig,
    ProjectedKLConfig,
    SortedProbabilitiesConfig,
)

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMON = {row.path for row in describe(RunConfig)}
DEFAULT_LOSS = "| `loss` | one of the losses | `projected_kl` |"
"""Told in a sentence of the README."""


@pytest.mark.parametrize(
    "config_class",
    [
        DistillationConfig,
        OffPolicyDistillationConfig,
        CrossTokenizerConfig,
        DivergenceConfig,
        MixedKLConfig,
        JensenShannonConfig,
        ProjectedKLConfig,
        SortedProbabilitiesConfig,
        OnPolicyDistillationConfig,
    ],
)
def test_the_readme_tells_every_setting(config_class):
    for row in describe(config_class):
        if row.path not in COMMON:
            assert row.doc, f"{row.path} has no docstring"
            line = f"| `{row.path}` | {row.allowed} | `{row.default}` | {row.doc} |"
            assert line in README or line.startswith(DEFAULT_LOSS)
