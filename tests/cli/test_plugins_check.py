"""`nemo-rl plugins check`: the kit of a component, clause by clause."""

from __future__ import annotations

import json

import pytest

LOSS = """
from attrs import frozen
from nemo_rl_core.protocols.loss import LossSums

@frozen(kw_only=True)
class Config:
    sign: float = 1.0

class Loss:
    config_class = Config
    denominator = "tokens"
    needs = frozenset({"logprobs"})
    def __init__(self, config=None):
        self.config = config or Config()
    def __call__(self, outputs, batch):
        mask = batch["loss_mask"]
        kept = outputs.logprobs.masked_fill(~mask, 0.0) * batch["advantages"].masked_fill(~mask, 0.0)
        return LossSums(-self.config.sign * kept.sum())
"""


@pytest.fixture
def checked(cli):
    cli.site.install("kit-dist", "1.0", entry_points={"losses": {"kept": "kit_pkg:Loss"}}, modules={"kit_pkg": LOSS})
    return cli


def test_a_sound_component_passes(checked):
    done = checked("plugins", "check", "kept")
    assert done.returncode == 0, done.stdout + done.stderr
    header = next(line for line in done.stdout.splitlines() if line.startswith("clause"))
    assert header.split() == ["clause", "outcome", "seconds"]
    assert "0 failed" in done.stdout


def test_one_that_breaks_a_clause_fails_with_its_name(checked):
    done = checked("plugins", "check", "kept", "--option", "sign=-1", "--only", "sign", "--only", "packing")
    assert done.returncode == 1
    outcomes = {
        line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if line.startswith(("sign", "pack"))
    }
    assert outcomes == {"sign": "failed", "packing": "passed"}
    assert "failed: sign" in done.stdout


def test_json_has_every_clause(checked):
    found = json.loads(checked("plugins", "check", "kept", "--only", "sign", "--json").stdout)
    assert (found["component"], found["passed"]) == ("kit-dist:kept", True)
    assert [(c["clause"], c["outcome"]) for c in found["clauses"]] == [("sign", "passed")]


def test_wrong_use_is_told_once(checked):
    done = checked("plugins", "check", "kept", "--option", "sgn=1")
    assert done.returncode != 0 and "sgn" in done.stderr and "sign" in done.stderr
    assert checked("plugins", "check", "kept", "--option", "nonsense").returncode == 2
    done = checked("plugins", "check", "kep", "--kind", "losses")
    assert done.returncode == 3 and "Did you mean 'kept'?" in done.stderr
    done = checked("plugins", "check", "local", "--kind", "commands")
    assert done.returncode == 3
