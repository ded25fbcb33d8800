"""Every generator, mixtures, curricula, names by hook, and refused options."""

from __future__ import annotations

import decimal
import json
import os
import pickle
import subprocess
import sys
from collections import Counter

import pluggy
import pytest
from reasoning_gym.factory import DATASETS

from nemo_rl_core import hookspecs
from nemo_rl_core.errors import ConfigError, DataError
from nemo_rl_plugins_env_reasoning_gym import hooks, named
from nemo_rl_plugins_env_reasoning_gym.dataset import CurriculumStage, ReasoningGymData, ReasoningGymSource
from nemo_rl_plugins_env_reasoning_gym.scoring import score_task
from nemo_rl_plugins_env_reasoning_gym.seeded import HASH_DEPENDENT, SeededGenerator
from nemo_rl_plugins_env_reasoning_gym.tasks import TASKS

WITHOUT_A_SOLUTION = {"boxnet", "rush_hour"}
"""Generators that can check an answer but do not know one themselves."""
SOLUTION_IN_METADATA = {
    "graph_color": lambda metadata: json.dumps(metadata["possible_answer"]),
    "propositional_logic": lambda metadata: metadata["example_answer"],
    "rubiks_cube": lambda metadata: metadata["example_correct_answer"],
}


def rows_of(**options):
    return ReasoningGymSource(ReasoningGymData(**options)).load()


def test_the_list_of_tasks_is_that_of_the_installed_version():
    assert set(TASKS) == set(DATASETS) - {"composite"}


@pytest.mark.parametrize("task", TASKS)
def test_every_generator_yields_a_row_that_its_own_answer_solves(task, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # generate in this process, which is faster and here as good
    row = rows_of(task=task, size=3, seed=7)[1]
    assert row["prompt"] == row["question"] and row["metadata"]["source_dataset"] == task
    assert json.loads(json.dumps(row))["question"] == row["question"]
    if task in WITHOUT_A_SOLUTION:
        assert row["answer"] is None and score_task("nonsense", row).score < 0.5
        return
    answer = SOLUTION_IN_METADATA[task](row["metadata"]) if task in SOLUTION_IN_METADATA else row["answer"]
    assert score_task(answer, row).score == 1.0


def test_rows_depend_on_seed_and_index_alone():
    rows = rows_of(task="chain_sum", size=50, seed=1)
    assert len(rows) == 50
    assert rows[3] == rows_of(task="chain_sum", size=50, seed=1)[3] == rows[-47]
    assert rows[3] != rows_of(task="chain_sum", size=50, seed=2)[3]
    assert len({row["question"] for row in rows}) > 40
    rows[3]["question"] = "changed"
    assert rows[3]["question"] != "changed"
    with pytest.raises(IndexError):
        rows[50]


def test_a_task_that_sets_the_decimal_precision_does_not_spoil_another():
    precision = decimal.getcontext().prec
    for row in rows_of(task="decimal_arithmetic", size=5, options={"precision": 6}):
        score_task("1.5", row)
    assert decimal.getcontext().prec == precision
    decimal.getcontext().prec = 4
    try:
        for row in rows_of(task="power_function", size=20, seed=7):
            assert score_task(row["answer"], row).score == 1.0
    finally:
        decimal.getcontext().prec = precision


def test_rows_do_not_depend_on_the_hash_seed_of_the_process(monkeypatch):
    """Made in a process with hash seed 0, and here, where strings hash by another seed."""
    tasks = ["isomorphic_strings", "polynomial_multiplication"]
    assert set(tasks) < HASH_DEPENDENT
    code = (
        "import json\n"
        "from nemo_rl_plugins_env_reasoning_gym.dataset import ReasoningGymData, ReasoningGymSource\n"
        f"for task in {tasks}:\n"
        "    print(json.dumps(ReasoningGymSource(ReasoningGymData(task=task, size=6, seed=5)).load()[:]))\n"
    )
    env = {**os.environ, "PYTHONHASHSEED": "0"}
    made = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    here = [rows_of(task=task, size=6, seed=5)[:] for task in tasks]
    assert [json.loads(line) for line in made.splitlines()] == json.loads(json.dumps(here))


def test_a_generator_in_its_own_process_tells_what_failed():
    rows = SeededGenerator("ransom_note", DATASETS["ransom_note"][1](seed=1, size=3))
    with pytest.raises(DataError, match=r"ransom_note.*row None.*TypeError"):
        rows[None]
    assert "question" in rows[2]
    broken = SeededGenerator("no_such_task", None)
    with pytest.raises(DataError, match=r"no_such_task.*died"):
        broken[0]


def test_options_reach_the_generator():
    for row in rows_of(task="chain_sum", size=20, options={"min_terms": 2, "max_terms": 2, "max_digits": 1}):
        assert row["metadata"]["num_terms"] == 2


def test_a_mixture_draws_by_weight():
    options = {"chain_sum": {"min_terms": 3, "max_terms": 3}}
    rows = rows_of(tasks={"chain_sum": 3.0, "gcd": 1.0}, size=400, options=options)
    drawn = Counter(row["metadata"]["source_dataset"] for row in rows)
    assert 260 < drawn["chain_sum"] < 340 and drawn["chain_sum"] + drawn["gcd"] == 400
    terms = {r["metadata"]["num_terms"] for r in rows if r["metadata"]["source_dataset"] == "chain_sum"}
    assert terms == {3}
    assert not rows.ordered


def test_a_curriculum_grows_in_stages_and_keeps_its_order():
    stages = (
        CurriculumStage(rows=20, level=0),
        CurriculumStage(rows=20, level=0, levels={"num_terms": 3}),
        CurriculumStage(rows=20, level=2, options={"min_terms": 6, "max_terms": 6}),
    )
    rows = rows_of(task="chain_sum", curriculum=stages)
    assert rows.ordered and len(rows) == 60
    terms = [row["metadata"]["num_terms"] for row in rows]
    assert set(terms[:20]) == {2}
    assert min(terms[20:40]) >= 2 and max(terms[20:40]) == 5
    assert set(terms[40:]) == {6}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either `task: <name>` or `tasks"),
        ({"task": "gcd", "tasks": {"lcm": 1.0}}, "either `task"),
        ({"task": "chain_sun"}, "Did you mean 'chain_sum'"),
        ({"task": "chain_sum", "options": {"terms": 2}}, r"no option 'terms'.*min_terms"),
        ({"task": "chain_sum", "options": {"min_terms": 5, "max_terms": 2}}, "refuses its options"),
        ({"task": "chain_sum", "curriculum": (CurriculumStage(rows=1, level=99),)}, "num_terms 0 to 10"),
        ({"task": "chain_sum", "curriculum": (CurriculumStage(rows=1, levels={"x": 0}),)}, "no {'x': 0}"),
        ({"task": "acre", "curriculum": (CurriculumStage(rows=1, level=1),)}, "no curriculum"),
        ({"tasks": {"gcd": 0.0}}, "above 0"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ConfigError, match=message):
        rows_of(**options)


def test_every_task_is_handed_over_by_name():
    manager = pluggy.PluginManager("nemo_rl")
    manager.add_hookspecs(hookspecs)
    manager.register(hooks)
    (datasets,) = manager.hook.nemo_rl_datasets()
    (environments,) = manager.hook.nemo_rl_environments()
    assert {name.removeprefix("reasoning_gym/") for name in datasets} >= set(TASKS)
    assert set(datasets) == set(environments)
    for target in {datasets["reasoning_gym/gcd"], environments["reasoning_gym/gcd"]}:
        module, _, attribute = target.partition(":")
        assert getattr(__import__(module, fromlist=["_"]), attribute).config_class


def test_the_class_of_one_task():
    source = pickle.loads(pickle.dumps(named.gcd))
    assert source is named.gcd
    assert source(ReasoningGymData(size=2)).load()[0]["metadata"]["source_dataset"] == "gcd"
    with pytest.raises(ConfigError, match="is one task"):
        source(ReasoningGymData(task="lcm"))
    with pytest.raises(AttributeError, match="no_such_task"):
        named.no_such_task


def test_listing_the_tasks_does_not_import_reasoning_gym():
    code = (
        "import sys; from nemo_rl_plugins_env_reasoning_gym import hooks, environment; hooks.nemo_rl_datasets();"
        "sys.exit(any(m in sys.modules for m in ('reasoning_gym', 'torch', 'sympy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
