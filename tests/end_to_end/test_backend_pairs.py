"""Both trainers with our own engine, here and on Ray: one configuration, three names. vLLM's pairs stand apart."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from pairs import ROOT, Runs, check_pair, check_same_first_step, check_same_run, load_pairs

pytestmark = [pytest.mark.xdist_group("backend_pairs"), pytest.mark.timeout(300)]
ENGINE = "torch_engine"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("launcher", ["local", "ray"])
@pytest.mark.parametrize("training", ["dtensor", "megatron"])
def test_the_pair_trains(runs, training, launcher):
    check_pair(training, ENGINE, launcher, runs(training, ENGINE, launcher))


@pytest.mark.parametrize("training", ["dtensor", "megatron"])
def test_ray_takes_the_steps_of_this_machine(runs, training):
    check_same_run(runs(training, ENGINE, "local"), runs(training, ENGINE, "ray"))


def test_both_trainers_take_the_same_first_step(runs):
    check_same_first_step(runs("dtensor", ENGINE, "local"), runs("megatron", ENGINE, "local"))


# -- the table ---------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded():
    return json.loads(load_pairs().RESULTS.read_text())


def test_every_pair_is_on_record_and_within_the_bar(recorded):
    pairs = load_pairs()
    assert [pairs.Pair(*(row[name] for name in pairs.Pair._fields)) for row in recorded["rows"]] == pairs.PAIRS
    assert len(pairs.PAIRS) == 8
    assert recorded["mismatch_bar"] == pairs.MISMATCH_BAR
    for row in recorded["rows"]:
        assert row["steps"] == pairs.STEPS == len(row["rewards"])
        assert row["on_policy"]
        assert row["mismatch"] < pairs.MISMATCH_BAR


def test_the_record_is_of_the_configuration_that_runs(recorded):
    pairs = load_pairs()
    assert recorded["config"] == pairs.config_of(pairs.Pair("...", "...", "..."), Path("..."))


def test_the_page_shows_what_is_on_record(recorded, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_extensions"))
    from pair_pages import pairs_markdown

    page = (ROOT / "docs/guides/backends/index.md").read_text()
    assert "```{include} ../../_generated/backend_pairs.md" in page
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in pairs_markdown(ROOT).splitlines()
        if line.startswith("| `")
    ]
    assert [cell[:3] for cell in cells] == [
        [f"`{row[name]}`" for name in ("training", "generation", "launcher")] for row in recorded["rows"]
    ]
    for cell, row in zip(cells, recorded["rows"], strict=True):
        assert cell[3] == f"{row['rewards'][0]:.3f} → {row['rewards'][-1]:.3f}"
        assert float(cell[4]) == pytest.approx(row["mismatch"] - 1, rel=0.1)


@pytest.mark.parametrize("name", ["megatron", "ray"])
def test_a_pair_whose_package_is_missing_is_known(name, monkeypatch):
    pairs = load_pairs()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == name else find(module))
    assert not pairs.Pair("megatron", "torch_engine", "ray").installed
    assert pairs.Pair("dtensor", "torch_engine", "local").installed
