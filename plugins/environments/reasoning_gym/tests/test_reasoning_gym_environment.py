"""Scores against recorded rewards, extraction, and failures of scorers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import multiprocessing
from pathlib import Path

import pytest

from nemo_rl_core.errors import DataError, DeadlineExceeded
from nemo_rl_plugins_env_reasoning_gym.environment import ReasoningGymConfig, ReasoningGymEnvironment
from nemo_rl_plugins_env_reasoning_gym.scoring import extract_answer, score_task

SAMPLE = [json.loads(line) for line in (Path(__file__).parent / "sample_rollouts.jsonl").read_text().splitlines()]
ROW = {"prompt": "4 + 3 =", "question": "4 + 3 =", "answer": "7", "metadata": {"source_dataset": "chain_sum"}}


class Inline:
    async def run_in_pool(self, function, *args, timeout_s=None, **kwargs):
        self.timeout_s = timeout_s
        return function(*args, **kwargs)


class Expired:
    async def run_in_pool(self, function, *args, timeout_s=None, **kwargs):
        raise DeadlineExceeded("worker killed")


def play(response, row=ROW, context=None, **options):
    environment = ReasoningGymEnvironment(ReasoningGymConfig(**options), context or Inline())
    environment.reset({"prompt": row.get("question", "q"), **row}, seed=0)
    return asyncio.run(environment.step({"role": "assistant", "content": response}))


@pytest.mark.parametrize("row", SAMPLE, ids=lambda row: row["response"][:12])
def test_sample(row):
    step = play(row["response"], row)
    assert step.rewards == pytest.approx({"score": row["reward"]}) and step.terminated


def gym_file(name):
    path = Path("shared/data/gym/reasoning_gym") / name
    found = next((p / path for p in Path(__file__).resolve().parents if (p / path).is_file()), None)
    if found is None:
        pytest.skip(f"{path} is not above this checkout")
    return [json.loads(line) for line in found.read_text().splitlines()]


def test_recorded_gym_rollouts_get_the_recorded_reward():
    rows = {row["question"]: row for row in gym_file("example.jsonl")}
    for record in gym_file("example_rollouts.jsonl"):
        parts = [c for item in record["response"]["output"] if item["type"] == "message" for c in item["content"]]
        text = "".join(part["text"] for part in parts)
        asked = record["responses_create_params"]["input"][0]["content"]
        names = json.loads(json.dumps(rows.get(asked) or solved(asked, record["extracted_answer"])))
        assert play(text, names).rewards == {"score": record["score"]} == {"score": record["reward"]}


def solved(question, answer):
    """A recorded rollout does not carry its row; the right answer stands in it, for its recorded score is 1."""
    return {"question": question, "answer": answer.strip(), "metadata": {"source_dataset": "knights_knaves"}}


def test_gym_example_rows_score_their_own_answer():
    for row in gym_file("example.jsonl"):
        assert play(f"<answer>{row['answer']}</answer>", row).rewards == {"score": 1.0}
        assert play("<answer>nobody knows</answer>", row).rewards["score"] < 0.5


@pytest.mark.parametrize(
    ("response", "extraction", "answer"),
    [
        ("a <answer> 1 </answer> <answer>2</answer>", "auto", "2"),
        (r"\boxed{3} <answer>2</answer>", "auto", "2"),
        (r"\boxed{3} <answer>2</answer>", "boxed", "3"),
        (r"so \boxed{\frac{1}{2}}", "auto", r"\frac{1}{2}"),
        ("  just this \n", "auto", "just this"),
        ("<answer>\nline one\nline two\n</answer>", "tag", "line one\nline two"),
        ("no tag", "tag", None),
        ("no box", "boxed", None),
        (r"\boxed{open", "boxed", None),
        ("<answer>2</answer>", "text", "<answer>2</answer>"),
    ],
)
def test_extraction(response, extraction, answer):
    assert extract_answer(response, extraction=extraction) == answer


def test_another_tag():
    assert play("<answer>1</answer><final>7</final>", tag="final").rewards == {"score": 1.0}
    assert extract_answer("<a.b>1</a.b> <aXb>2</aXb>", tag="a.b") == "1"


def test_what_is_recorded_beside_the_score():
    assert play("8").info == {
        "extracted_answer": "8",
        "solved": 0.0,
        "no_answer": 0.0,
        "scorer_error": 0.0,
        "timeout": 0.0,
    }
    assert play("8", extraction="tag").info["no_answer"] == 1.0


def test_a_scorer_that_trips_over_an_answer_scores_zero_and_is_counted():
    broken = {**ROW, "answer": None}  # the base scorer looks for None in a text
    step = play("8", broken)
    assert step.rewards == {"score": 0.0} and step.info["scorer_error"] == 1.0
    assert "TypeError" in score_task("8", broken).scorer_error


def test_a_passed_deadline_scores_zero_and_is_counted():
    step = play("7", context=Expired())
    assert step.rewards == {"score": 0.0} and step.info["timeout"] == 1.0
    context = Inline()
    play("7", context=context, timeout_s=1.5)
    assert context.timeout_s == 1.5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "a"}, r"no `metadata.source_dataset`.*'question', 'answer'"),
        ({"question": "q", "answer": "a", "metadata": {"source_dataset": "nope"}}, "'nope'"),
    ],
)
def test_rows_that_cannot_be_scored_are_errors(row, message):
    with pytest.raises(DataError, match=message):
        play("a", row)


def test_through_a_real_process():
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:

        class Pool:
            async def run_in_pool(self, function, *args, timeout_s=None, **kwargs):
                return pool.submit(function, *args, **kwargs).result(60)

        assert play("<answer>7</answer>", context=Pool()).rewards == {"score": 1.0}
