"""A run of 20 steps in which processes of each kind are killed ends as one that nothing happened to."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow, pytest.mark.timeout(900)]

KILLS = [
    (2, "generate", "reward"),
    (3, "save", "engine"),
    (5, "refit", "reward"),
    (6, "save", "reward"),
    (8, "refit", "engine"),
    (10, "train", "reward"),
    (11, "generate", "engine"),
    (14, "train", "trainer"),
    (18, "save", "trainer"),
]
"""A trainer that dies costs another start of the run; the full matrix is the benchmark's."""


@pytest.fixture(scope="module")
def matrix():
    path = Path(__file__).parents[4] / "benchmarks" / "kill_matrix.py"
    found = importlib.util.spec_from_file_location("kill_matrix", path)
    module = importlib.util.module_from_spec(found)
    sys.modules["kill_matrix"] = module
    found.loader.exec_module(module)
    yield module
    del sys.modules["kill_matrix"]


def test_a_run_under_fire_loses_nothing(matrix, connected, tmp_path, caplog):
    torch.set_num_threads(1)
    matrix.attempt(str(tmp_path / "undisturbed"), [], {"launcher": "local"})  # the same steps, without Ray
    expected = matrix.story(str(tmp_path / "undisturbed"))
    prompts = [prompt for step in expected["prompts"] for prompt in step]
    assert expected["steps"] == list(range(1, 21)) and len(set(prompts)) == len(prompts) == 40

    folder = str(tmp_path / "under-fire")
    stops = matrix.campaign(folder, KILLS, {"launcher": "ray", "options": {"failure_grace_s": 2.0}})
    assert matrix.fired(folder) == {"-".join(map(str, kill)) for kill in KILLS}
    assert matrix.differences(matrix.story(folder), expected) == []

    assert [stop.split(" on ")[0] for stop in stops] == ["WorkerDied: The policy worker of rank 0"] * 2
    assert "during train_step" in stops[0] and "during save_checkpoint" in stops[1]
    restarts = [r.getMessage() for r in caplog.records if "Starting it again" in r.getMessage()]
    assert len(restarts) == 3 and all("engine generation is gone" in text for text in restarts)


def test_what_differs_is_told(matrix, tmp_path):
    """The judge itself: one step twice, one prompt twice, one other token, one other weight."""
    base = {
        "steps": [1, 2],
        "prompts": [["a"], ["b"]],
        "rollouts": [[(1, "x", 0.5)], [(2, "y", 0.5)]],
        "metrics": [[0.1, 1.0, 0.5], [0.2, 1.0, 0.5]],
        "weights": {"w": torch.zeros(3)},
    }
    assert matrix.differences(base, base) == []
    changes = {
        "steps": [1, 1],
        "prompts": [["a"], ["a"]],
        "rollouts": [[(1, "x", 0.5)], [(2, "z", 0.5)]],
        "metrics": [[0.1, 1.0, 0.5], [0.21, 1.0, 0.5]],
    }
    for name, value in changes.items():
        assert matrix.differences({**base, name: value}, base) == [name]
    assert matrix.differences({**base, "weights": {"w": torch.tensor([0.0, 0.0, 1e-3])}}, base) == ["w"]


def test_the_table_in_the_docs_is_that_of_the_results(matrix):
    report = json.loads(matrix.RESULTS.read_text(encoding="utf-8"))
    page = matrix.PAGE.read_text(encoding="utf-8")
    assert matrix.with_table(page, report) == page, "run python benchmarks/kill_matrix.py --table"
    assert report["results"]
    for row in report["results"]:
        assert row["killed"] and row["differences"] == [], row
