"""`nemo-rl plugins check`: the kit of a component, clause by clause."""

from __future__ import annotations

import json

import pytest

from nemo_rl_core.cli import main

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
def checked(plugin_site, capsys):
    """`checked("kept", ...)` is the exit status, output and error output of `nemo-rl plugins check kept ...`."""
    plugin_site.install("kit-dist", "1.0", entry_points={"losses": {"kept": "kit_pkg:Loss"}}, modules={"kit_pkg": LOSS})

    def check(*arguments):
        status = main(["plugins", "check", *arguments])
        return status, *capsys.readouterr()

    return check


def test_a_sound_component_passes(checked):
    status, out, err = checked("kept")
    assert status == 0, out + err
    header = next(line for line in out.splitlines() if line.startswith("clause"))
    assert header.split() == ["clause", "outcome", "seconds"]
    assert "0 failed" in out


def test_one_that_breaks_a_clause_fails_with_its_name(checked):
    status, out, _ = checked("kept", "--option", "sign=-1", "--only", "sign", "--only", "packing")
    assert status == 1
    outcomes = {line.split()[0]: line.split()[1] for line in out.splitlines() if line.startswith(("sign", "pack"))}
    assert outcomes == {"sign": "failed", "packing": "passed"}
    assert "failed: sign" in out


def test_json_has_every_clause(checked):
    found = json.loads(checked("kept", "--only", "sign", "--json")[1])
    assert (found["component"], found["passed"]) == ("kit-dist:kept", True)
    assert [(c["clause"], c["outcome"]) for c in found["clauses"]] == [("sign", "passed")]


def test_wrong_use_is_told_once(checked):
    status, _, err = checked("kept", "--option", "sgn=1")
    assert status != 0 and "did you mean `sign`" in err and err.count("error: ") == 1
    assert checked("kept", "--option", "nonsense")[0] == 2
    status, _, err = checked("kep", "--kind", "losses")
    assert status == 3 and "Did you mean 'kept'?" in err
    assert checked("local", "--kind", "commands")[0] == 3


SOURCE = """
from attrs import frozen

@frozen(kw_only=True)
class Options:
    path: str

class Lines:
    config_class = Options
    def __init__(self, config):
        self.path = config.path
    def load(self):
        return [{"prompt": line} for line in open(self.path, encoding="utf-8").read().split()]
"""


def test_what_a_component_needs_is_asked_for_and_taken(checked, plugin_site, tmp_path):
    plugin_site.install(
        "rows-dist", "1.0", entry_points={"datasets": {"words": "words_pkg:Lines"}}, modules={"words_pkg": SOURCE}
    )
    status, out, err = checked("words")
    assert status == 2 and out == "" and err.count("error: ") == 1
    assert "Give them as --option key=value" in err and "path\n" in err and "this setting is missing" in err
    (tmp_path / "words.txt").write_text("a b c d e f g h i j")
    status, out, err = checked("words", "--option", f"path={tmp_path / 'words.txt'}")
    assert status == 0, out + err


def test_an_example_serves_in_place_of_options(checked, plugin_site):
    example = """
    @staticmethod
    def example(folder):
        (folder / "words.txt").write_text("a b c d e f g h i j")
        return {"path": str(folder / "words.txt")}
"""
    plugin_site.install(
        "rows-dist", "1.0", entry_points={"datasets": {"words": "ex_pkg:Lines"}}, modules={"ex_pkg": SOURCE + example}
    )
    status, out, err = checked("words")
    assert status == 0, out + err
