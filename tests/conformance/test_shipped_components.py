"""What we ship passes its kits: by name, as `nemo-rl plugins check` does it, and in each package's own tests."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch

from nemo_rl_core.registry import get_registry
from nemo_rl_core.testing import contract_for, run_kit

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_OPTIONS = ("advantages", "callbacks", "environments", "exporters", "loggers", "losses", "rewards", "sandboxes")
"""Kinds whose components can be made from their defaults."""
KINDS = (*WITHOUT_OPTIONS, "datasets")
NEEDS_MORE_THAN_DEFAULTS = {
    "forward_kl": "a teacher's likeliest tokens",
    "gae": "a critic's values",
    "jensen_shannon": "a teacher's likeliest tokens",
    "kto": "an estimate of the KL",
    "mixed_kl": "a teacher's likeliest tokens",
    "on_policy_distillation": "a teacher's logprobs",
    "projected_kl": "a teacher's likeliest tokens",
    "reverse_kl": "a teacher's likeliest tokens",
    "reward_model": "a trained model",
    "sorted_probabilities": "a teacher's likeliest tokens",
}
"""Components that the kits cannot call as they are: what they need is made by the tests of their packages."""


def shipped(kinds):
    """(kind, name, import path, package) of each component in a pyproject of ours."""
    for file in [
        ROOT / "pyproject.toml",
        *sorted(ROOT.glob("plugins/*/pyproject.toml")),
        *sorted(ROOT.glob("nemo_rl_plugins_*/pyproject.toml")),
    ]:
        groups = tomllib.loads(file.read_text())["project"].get("entry-points", {})
        for kind in kinds:
            for name, value in groups.get(f"nemo_rl.{kind}", {}).items():
                yield pytest.param(kind, name, value, file.parent, id=f"{kind}-{name}")


@pytest.mark.parametrize(("kind", "name", "value", "package"), list(shipped(WITHOUT_OPTIONS)))
def test_passes_its_kit_by_name(kind, name, value, package):
    if name in NEEDS_MORE_THAN_DEFAULTS:
        pytest.skip(f"needs {NEEDS_MORE_THAN_DEFAULTS[name]}; tested in {package.name}")
    contract = contract_for(kind)
    ref = get_registry().resolve(kind, name)
    report = run_kit(contract, lambda: contract.from_component(ref, {}))
    assert report.passed, [result for result in report.results if result.outcome == "failed"]


@pytest.mark.parametrize(("kind", "name", "value", "package"), list(shipped(KINDS)))
def test_its_package_has_a_conformance_test(kind, name, value, package):
    files = (package / "tests").rglob("test_*.py")
    text = "\n".join(file.read_text() for file in files)
    assert f"({contract_for(kind).__name__})" in text, f"no test of {package.name} sub-classes the contract of {kind}"
    assert value.rpartition(":")[2] in text
