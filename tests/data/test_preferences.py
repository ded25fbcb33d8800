"""Preference rows of every form, what is wrong with others, and pairs in a batch."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_core.data.encoding import ConversationEncoder
from nemo_rl_core.data.preference_batch import pair_positions, preference_batch
from nemo_rl_core.data.preferences import LabelledAnswer, PreferencePair, labelled_answers, preference_pair
from nemo_rl_core.errors import DataError, ShapeMismatch
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.records.batch import BatchedDataDict


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


PAIR = PreferencePair(prompt=[user("q")], chosen=[said("a")], rejected=[said("b")])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [user("q")], "chosen": [said("a")], "rejected": [said("b")]},
        {"context": [user("q")], "chosen": "a", "rejected": [said("b")]},
        {"prompt": "q", "chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")]},
        {"chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")]},
        {"prompt": [{**user("q"), "tool_calls": None}], "chosen": "a", "rejected": "b", "other": 1},
    ],
    ids=["texts", "messages", "context", "repeated-prompt", "implicit-prompt", "empty-columns"],
)
def test_two_answers(row):
    assert preference_pair(row) == PAIR


def test_the_implicit_prompt_is_what_both_begin_with():
    start = [{"role": "system", "content": "s"}, user("q"), said("x"), user("r")]
    pair = preference_pair({"chosen": [*start, said("a")], "rejected": [*start, said("b"), user("c"), said("d")]})
    assert pair.prompt == start
    assert (pair.chosen, pair.rejected) == ([said("a")], [said("b"), user("c"), said("d")])
    same = preference_pair({"chosen": [user("q"), said("a")], "rejected": [user("q"), said("a")]})
    assert same.prompt == [user("q")]


@pytest.mark.parametrize(
    ("row", "margin"),
    [
        ({"margin": 2}, 2.0),
        ({"score_chosen": 8.5, "score_rejected": 6}, 2.5),
        ({"margin": None}, None),
        ({}, None),
    ],
)
def test_the_margin_of_a_pair(row, margin):
    assert preference_pair({"prompt": "q", "chosen": "a", "rejected": "b", **row}).margin == margin


@pytest.mark.parametrize(
    ("preference", "chosen", "margin", "tie"), [(-3, "a", 3.0, False), (1, "b", 1.0, False), (0, "b", 0.0, True)]
)
def test_two_responses_with_a_preference(preference, chosen, margin, tie):
    pair = preference_pair({"context": "q", "response1": "a", "response2": "b", "overall_preference": preference})
    assert (pair.chosen, pair.margin, pair.tie) == ([said(chosen)], margin, tie)


def test_ranked_completions_give_the_best_and_the_worst():
    ranks = {
        "completions": [{"rank": 1, "completion": "m"}, {"rank": 2, "completion": "b"}, {"rank": 0, "response": "a"}]
    }
    pair = preference_pair({"context": [user("q")], **ranks})
    assert (pair.chosen, pair.rejected, pair.margin, pair.tie) == ([said("a")], [said("b")], 2.0, False)
    scores = {"completions": [{"score": 0.5, "completion": [said("b")]}, {"score": 2, "completion": [said("a")]}]}
    pair = preference_pair({"prompt": "q", **scores})
    assert (pair.chosen, pair.rejected, pair.margin) == ([said("a")], [said("b")], 1.5)
    tie = {"completions": [{"rank": 1, "completion": "a"}, {"rank": 1, "completion": "b"}]}
    assert preference_pair({"prompt": "q", **tie}).tie


def test_answers_with_a_verdict():
    row = {"prompt": "q", "completion": "a", "label": 1}
    answer = LabelledAnswer(prompt=[user("q")], answer=[said("a")], good=True)
    assert labelled_answers(row) == [answer]
    bad = LabelledAnswer(prompt=[user("q")], answer=[said("b")], good=False)
    assert labelled_answers({"prompt": "q", "chosen": "a", "rejected": "b"}) == [answer, bad]
    tie = {"prompt": "q", "response1": "a", "response2": "b", "overall_preference": 0}
    assert labelled_answers(tie) == []


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "q", "answer": "a"}, "Row 3 is no preference: it has `prompt`, `answer`"),
        ({}, "no column"),
        ({"chosen": "a", "rejected": "b"}, "Give the `prompt` beside it"),
        ({"chosen": [said("a")], "rejected": [said("b")]}, "no message in common"),
        ({"prompt": "q", "chosen": "a", "rejected": [user("b")]}, "`rejected` of row 3 has no assistant message"),
        ({"prompt": "q", "chosen": "a", "rejected": ["b"]}, "Message 0 in the column `rejected`"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "column `prompt` of row 3 holds 3"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "big"}, "`margin` of row 3 holds 'big'"),
        ({"prompt": "q", "response1": "a", "response2": "b", "overall_preference": None}, "must be a number"),
        ({"response1": "a", "response2": "b", "overall_preference": 1}, "has no `prompt`"),
        ({"prompt": "q", "completions": [{"rank": 0, "completion": "a"}]}, "two or more"),
        ({"prompt": "q", "completions": ["a", "b"]}, "Completion 0 of row 3"),
        ({"prompt": "q", "completions": [{"completion": "a"}, {"completion": "b"}]}, "neither a `rank`"),
    ],
)
def test_what_is_wrong_with_a_row(row, says):
    with pytest.raises(DataError, match=says):
        preference_pair(row, where="row 3")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "q", "completion": "a"}, "an answer with a verdict needs"),
        ({"prompt": "q", "completion": "a", "label": "yes"}, "'yes'; it must be true or false"),
        ({"completion": "a", "label": True}, "has no `prompt`"),
    ],
)
def test_what_is_wrong_with_a_verdict(row, says):
    with pytest.raises(DataError, match=says):
        labelled_answers(row, where="row 3")


# -- batches -------------------------------------------------------------------------------------------------


def test_pairs_in_a_batch():
    encoder = ConversationEncoder(load_tokenizer("scratch:qwen2-tiny"), max_length=32, train_on="last_assistant")
    tie = PreferencePair(prompt=[user("q")], chosen=[said("a")], rejected=[said("b")], margin=0.0, tie=True)
    batch = preference_batch([PAIR, tie], encoder)
    assert batch["group_ids"].tolist() == [0, 0, 1, 1]
    assert batch["is_chosen"].tolist() == [True, False] * 2
    assert batch.sum_per_sequence(batch["loss_mask"].long()).tolist() == [2, 2, 0, 0]
    chosen, rejected = pair_positions(batch)
    assert (chosen.tolist(), rejected.tolist()) == ([0], [1])


def grouped(groups, is_chosen, trained=None):
    trained = [True] * len(groups) if trained is None else trained
    return BatchedDataDict(
        [1] * len(groups),
        {"loss_mask": torch.tensor(trained)},
        {"group_ids": torch.tensor(groups), "is_chosen": torch.tensor(is_chosen, dtype=torch.bool)},
    )


def test_pairs_are_found_in_any_order():
    chosen, rejected = pair_positions(grouped([7, 2, 2, 7], [False, True, False, True]))
    assert (chosen.tolist(), rejected.tolist()) == ([1, 3], [2, 0])
    chosen, rejected = pair_positions(grouped([7, 2, 2, 7], [0, 1, 0, 1], trained=[True, True, False, True]))
    assert (chosen.tolist(), rejected.tolist()) == ([3], [0])


@pytest.mark.parametrize(
    ("groups", "is_chosen"),
    [([0, 0], [True, True]), ([0, 1], [True, False]), ([0], [True]), ([0, 0, 0, 0], [True, False, True, False])],
)
def test_what_is_no_pair_is_refused(groups, is_chosen):
    with pytest.raises(ShapeMismatch, match="not pairs by `group_ids`"):
        pair_positions(grouped(groups, is_chosen))
