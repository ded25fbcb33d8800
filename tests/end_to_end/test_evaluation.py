"""Evaluation of a small model: runs, subsets, votes, and what a user may get wrong."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from nemo_rl_core.cli._app import command
from nemo_rl_core.errors import ConfigError, DataError
from nemo_rl_core.schema import InvalidConfig
from nemo_rl_core.training.trainer import Trainer

DIGITS = r"(\d)"


def first_digit_is_even(response):
    found = next((c for c in response if c.isdigit()), "1")
    return float(int(found) % 2 == 0)


@pytest.fixture
def trainer(tiny):
    def make(**evaluation):
        evaluation.setdefault("temperature", 1.0)
        return Trainer({"algorithm": "grpo", **tiny(evaluation=evaluation)})

    return make


def test_runs_differ_and_are_averaged(trainer, rows):
    found = trainer(num_generations_per_prompt=4, num_runs=3, pass_at=[1, 2, 4]).evaluate(rows, first_digit_is_even)
    assert len(found.runs) == 3
    assert found.metrics["num_samples"] == 25
    for name in ("accuracy", "pass@1", "pass@2", "pass@4"):
        values = [run[name] for run in found.runs]
        mean = sum(values) / 3
        assert found.metrics[name] == pytest.approx(mean)
        assert found.std[name] == pytest.approx((sum((v - mean) ** 2 for v in values) / 2) ** 0.5)
        assert len(set(values)) > 1  # seeds of their own
    assert found.metrics["pass@1"] == pytest.approx(found.metrics["accuracy"])
    assert found.metrics["pass@1"] < found.metrics["pass@2"] < found.metrics["pass@4"]
    again = trainer(num_generations_per_prompt=4, num_runs=3, pass_at=[1, 2, 4]).evaluate(rows, first_digit_is_even)
    names = [name for name in found.metrics if not name.startswith("timing/")]
    assert [again.metrics[name] for name in names] == [found.metrics[name] for name in names]


def test_every_row_is_taken_and_subsets_are_told_apart(trainer, rows):
    many = [{**row, "level": "even" if i % 5 else "odd"} for i, row in enumerate(rows * 12)]
    found = trainer(subset_column="level").evaluate(many, lambda level: float(level == "even"))
    assert found.metrics["num_samples"] == 300  # validation.max_samples is 256
    assert found.subsets == {
        "even": {"num_prompts": 240.0, "accuracy": 1.0, "pass@1": 1.0},
        "odd": {"num_prompts": 60.0, "accuracy": 0.0, "pass@1": 0.0},
    }
    assert trainer(max_samples=7).evaluate(rows, lambda: 1.0).metrics["num_samples"] == 7


def test_votes_by_a_pattern(trainer, rows):
    found = trainer(num_generations_per_prompt=4, answer_pattern=DIGITS).evaluate(rows, first_digit_is_even)
    assert 0 <= found.metrics["cons@4"] <= found.metrics["pass@4"]
    without = trainer(num_generations_per_prompt=4).evaluate(rows, first_digit_is_even)
    assert not [name for name in without.metrics if name.startswith("cons@")]


def test_validation_during_a_run_has_pass_at_k(tiny, rows):
    validation = {"at_end": True, "num_generations_per_prompt": 3, "temperature": 1.0, "max_samples": 4}
    trainer = Trainer({"algorithm": "grpo", **tiny(max_steps=1, validation=validation)})
    result = trainer.fit(rows, first_digit_is_even, validation_dataset=rows)
    assert result.metrics["validation/accuracy"] <= result.metrics["validation/pass@3"]
    assert result.metrics["validation/num_samples"] == 4


def test_what_is_missing_is_named(trainer, rows):
    with pytest.raises(DataError, match=r"subset_column is 'level', but row 0 has no such column. It has: 'prompt'"):
        trainer(subset_column="level").evaluate(rows, lambda: 1.0)
    with pytest.raises(ConfigError, match="no answer was found in the info of any rollout at 'extracted_answer'"):
        trainer(num_generations_per_prompt=2, cons_at=[2]).evaluate(rows[:2], lambda: 1.0)
    with pytest.raises(ConfigError, match="There is no data to evaluate on. Set data.validation.source"):
        trainer().evaluate(None, lambda: 1.0)


@pytest.mark.parametrize(
    ("evaluation", "says"),
    [
        ({"pass_at": [8], "num_generations_per_prompt": 4}, "k=8 of 4 rollouts per prompt is not available"),
        ({"cons_at": [2]}, "k=2 of 1 rollouts per prompt is not available"),
        ({"pass_at": [0]}, "k=0 of 1 rollouts"),
        ({"num_generations_per_prompt": 4, "temperature": 0.0}, "all rollouts of a prompt are the same"),
        ({"num_runs": 2, "temperature": 0.0}, "all rollouts of a prompt are the same"),
        ({"answer_pattern": "(a"}, "no regular expression"),
        ({"num_runs": 0}, "num_runs"),
    ],
)
def test_mistakes_are_found_in_the_configuration(trainer, evaluation, says):
    with pytest.raises(InvalidConfig, match=says):
        trainer(**evaluation)


def test_the_command_prints_tables_and_json(tiny, rows, tmp_path):
    data, config, out = tmp_path / "rows.jsonl", tmp_path / "eval.yaml", tmp_path / "rollouts.jsonl"
    data.write_text("".join(json.dumps({**row, "part": f"p{i % 2}"}) + "\n" for i, row in enumerate(rows[:6])))
    settings = {
        **tiny(),
        "algorithm": "grpo",
        "environment": "math",
        "data": {"validation": {"source": str(data)}},
        "evaluation": {"num_generations_per_prompt": 2, "temperature": 1.0, "num_runs": 2, "subset_column": "part"},
    }
    config.write_text(json.dumps(settings))
    found = CliRunner().invoke(command(), ["eval", str(config), "--json", "--output", str(out)], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout.strip().splitlines()[-1])
    assert result["metrics"]["num_samples"] == 6
    assert set(result["subsets"]) == {"p0", "p1"} and len(result["runs"]) == 2
    assert {"pass@1", "pass@2", "accuracy"} <= result["std"].keys()
    assert len(out.read_text().splitlines()) >= 12
    found = CliRunner().invoke(command(), ["eval", str(config)], catch_exceptions=False)
    assert "std of 2 runs" in found.stdout and "pass@2" in found.stdout and "subset" in found.stdout
