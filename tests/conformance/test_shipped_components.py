"""What we ship passes its kits: by name, as `nemo-rl plugins check` does it, and in each package's own tests."""

from __future__ import annotations

import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from nemo_rl_core.errors import NemoRLError
from nemo_rl_core.registry import get_registry
from nemo_rl_core.testing import check_component, contract_for

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[2]
QUICK = (
    "advantages",
    "callbacks",
    "datasets",
    "environments",
    "exporters",
    "loggers",
    "losses",
    "rewards",
    "sandboxes",
    "weight_syncs",
)
"""Kinds of which every clause is run by name."""
MADE = {
    "algorithms": ["config", "declares_itself", "batch_fields", "trained_tokens"],
    "generation_backends": ["declares_itself", "logprobs"],
    "launchers": ["declares_its_config", "one_worker"],
    "training_backends": ["declares_itself", "logprobs"],
}
"""Kinds whose kits take long: run in their packages; by name only so far that they are made and looked at."""
ELSEWHERE = {"vllm": "has an environment of its own, where its package's kit is run"}
ASK_BY_THEMSELVES = {"agent"}
"""Environments that ask the policy themselves: the kit plays its turns, and so has no say in theirs."""


def shipped(kinds):
    """(kind, name, import path, package) of each component in a pyproject of ours."""
    for file in [
        ROOT / "pyproject.toml",
        *sorted(ROOT.glob("plugins/*/pyproject.toml")),
        *sorted(ROOT.glob("plugins/*/*/pyproject.toml")),
        *sorted(ROOT.glob("nemo_rl_plugins_*/pyproject.toml")),
    ]:
        groups = tomllib.loads(file.read_text())["project"].get("entry-points", {})
        for kind in kinds:
            for name, value in groups.get(f"nemo_rl.{kind}", {}).items():
                yield pytest.param(kind, name, value, file.parent, id=f"{kind}-{name}")


@pytest.mark.parametrize(("kind", "name", "value", "package"), list(shipped([*QUICK, *MADE])))
def test_passes_its_kit_by_name(kind, name, value, package):
    if name in ASK_BY_THEMSELVES:
        with pytest.raises(NemoRLError, match="asks the policy itself: test it with a RolloutEngine"):
            check_component(get_registry().resolve(kind, name))
        return
    if name in ELSEWHERE and find_spec(name) is None:
        pytest.skip(ELSEWHERE[name])
    report = check_component(get_registry().resolve(kind, name), only=MADE.get(kind, ()))
    assert report.passed, [result for result in report.results if result.outcome == "failed"]


@pytest.mark.parametrize(("kind", "name", "value", "package"), list(shipped([*QUICK, *MADE])))
def test_its_package_has_a_conformance_test(kind, name, value, package):
    files = (package / "tests").rglob("test_*.py")
    text = "\n".join(file.read_text() for file in files)
    if name in ASK_BY_THEMSELVES:
        assert "RolloutEngine(" in text
        return
    assert f"({contract_for(kind).__name__})" in text, f"no test of {package.name} subclasses the contract of {kind}"
    assert value.rpartition(":")[2] in text
