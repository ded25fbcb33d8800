"""pass@k and cons@k by hand, by brute force, and what they refuse."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.records.rollout import Rollout, RolloutError, RolloutGroup, Turn
from nemo_rl_core.rollouts.scores import Scoring, cons_at_k, pass_at_k, score_groups


@pytest.mark.parametrize(
    ("num", "correct", "k", "expected"),
    [
        (4, 1, 1, 1 / 4),  # one of four draws
        (4, 1, 2, 1 / 2),  # 1 - C(3,2)/C(4,2) = 1 - 3/6
        (5, 2, 3, 9 / 10),  # 1 - C(3,3)/C(5,3) = 1 - 1/10
        (10, 3, 5, 11 / 12),  # 1 - C(7,5)/C(10,5) = 1 - 21/252
        (8, 0, 8, 0.0),
        (8, 1, 8, 1.0),
        (8, 6, 3, 1.0),  # fewer than three are wrong
    ],
)
def test_pass_at_k_by_hand(num, correct, k, expected):
    assert pass_at_k(num, correct, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_holds_for_numbers_whose_binomials_pass_a_float():
    # C(5000, 2500) has 1504 digits; 1 - prod (1 - k/(n-i)) for c = 1 is k/n
    assert pass_at_k(5000, 1, 2500) == pytest.approx(0.5, abs=1e-12)


def test_pass_at_k_is_unbiased():
    """Over all outcomes of 4 draws that succeed with probability p, its mean is 1 - (1 - p)^k."""
    p = 0.3
    for k in (1, 2, 3, 4):
        mean = sum(
            pass_at_k(4, sum(draws), k) * p ** sum(draws) * (1 - p) ** (4 - sum(draws))
            for draws in itertools.product((0, 1), repeat=4)
        )
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "correct", "k", "expected"),
    [
        ("AAB", (1, 1, 0), 3, 1.0),  # two votes against one
        ("ABB", (1, 0, 0), 3, 0.0),
        ("AABB", (1, 1, 0, 0), 4, 1 / 2),  # a tie: each wins with probability 1/2
        # Of three choices of two of A, A, B: {A,A} is right, both {A,B} are ties: (1 + 1/2 + 1/2) / 3
        ("AAB", (1, 1, 0), 2, 2 / 3),
        ("AAB", (1, 1, 0), 1, 2 / 3),  # cons@1 is pass@1
        # -: no answer. {A,A}, 2 x {A,-}, 2 x {A,B}, {B,-}: (1 + 2 + 2/2 + 0) / 6
        ("AAB-", (1, 1, 0, 0), 2, 4 / 6),
        ("---", (0, 0, 0), 3, 0.0),
        ("-A-", (0, 1, 0), 3, 1.0),  # one vote is enough
        # Both say A, one is judged right (its format, perhaps): A is right by half
        ("AA", (1, 0), 2, 1 / 2),
    ],
)
def test_cons_at_k_by_hand(answers, correct, k, expected):
    found = cons_at_k([None if a == "-" else a for a in answers], [bool(c) for c in correct], k)
    assert found == pytest.approx(expected, abs=1e-15)


def by_brute_force(answers, correct, k):
    share = {a: sum(c for b, c in zip(answers, correct, strict=True) if a == b) / answers.count(a) for a in answers}
    values = []
    for chosen in itertools.combinations(range(len(answers)), k):
        votes = Counter(answers[i] for i in chosen if answers[i] is not None)
        top = [a for a, n in votes.items() if n == max(votes.values())]
        values.append(sum(share[a] for a in top) / len(top) if top else 0.0)
    return sum(values) / len(values)


def test_cons_at_k_equals_the_mean_over_all_choices():
    rng = random.Random(0)
    for _ in range(60):
        num = rng.randint(1, 8)
        answers = [rng.choice(["a", "b", "c", None]) for _ in range(num)]
        correct = [a is not None and rng.random() < 0.5 for a in answers]
        for k in range(1, num + 1):
            assert cons_at_k(answers, correct, k) == pytest.approx(by_brute_force(answers, correct, k), abs=1e-12)


@pytest.mark.parametrize("k", [0, 4, -1])
def test_k_beyond_the_attempts_is_refused(k):
    with pytest.raises(ConfigError, match=f"pass@k: k={k} of 3 attempts"):
        pass_at_k(3, 1, k)
    with pytest.raises(ConfigError, match=f"cons@k: k={k} of 3 attempts"):
        cons_at_k(["a", "b", "c"], [True, False, False], k)
    with pytest.raises(ConfigError, match="5 of 3 attempts cannot be correct"):
        pass_at_k(3, 5, 1)


# -- groups of rollouts ------------------------------------------------------------------------------------


def group(number, *attempts):
    """Attempts are (answer, reward), or None for one that failed."""
    rollouts = []
    for index, attempt in enumerate(attempts):
        rollout = Rollout(rollout_id=f"{number}/{index}", task_id=str(number), index=index, seed=0)
        if attempt is None:
            rollout.error = RolloutError(stage="step", type="ValueError", message="x")
        else:
            answer, reward = attempt
            rollout.rewards = {"correct": reward}
            rollout.info = {"extracted_answer": answer}
            text = f"I say ({answer}) or ({answer}x)"
            rollout.segments = [[Turn(message={"role": "assistant", "content": text}, token_ids=[1], sampled=True)]]
        rollouts.append(rollout)
    return RolloutGroup(group_id=number, task_id=str(number), rollouts=rollouts)


GROUPS = [
    group(0, ("7", 1.0), ("7", 1.0), ("8", 0.0), ("9", 0.0)),  # c = 2 of 4; the majority is right
    group(1, ("1", 0.0), ("1", 0.0), ("2", 1.0), ("3", 0.0)),  # c = 1 of 4; the majority is wrong
]


def test_scores_are_means_over_prompts():
    found = score_groups(GROUPS, Scoring(pass_at=(1, 2, 4), cons_at=(4,)))
    assert found == {
        "num_prompts": 2.0,
        "accuracy": 3 / 8,
        "pass@1": pytest.approx((2 / 4 + 1 / 4) / 2),
        "pass@2": pytest.approx((5 / 6 + 3 / 6) / 2),  # 1 - C(2,2)/C(4,2), 1 - C(3,2)/C(4,2)
        "pass@4": 1.0,
        "cons@4": 0.5,
    }


def test_what_counts_as_correct_is_a_threshold():
    groups = [group(0, ("a", 0.5), ("b", 0.2))]
    assert score_groups(groups, Scoring(pass_at=(2,)))["pass@2"] == 0.0
    assert score_groups(groups, Scoring(pass_at=(2,), correct_reward=0.5))["pass@2"] == 1.0
    rounded = [group(0, ("a", 0.1 + 0.2 + 0.7))]  # 0.99999999999999989
    assert score_groups(rounded, Scoring(pass_at=(1,)))["pass@1"] == 1.0


def test_prompts_with_failed_rollouts_count_where_enough_are_left():
    groups = [*GROUPS, group(2, ("5", 1.0), None, None, None)]
    found = score_groups(groups, Scoring(pass_at=(1, 4)))
    assert found["pass@1"] == pytest.approx((2 / 4 + 1 / 4 + 1) / 3)
    assert found["pass@4"] == 1.0  # of the two whole groups
    assert found["num_short"] == 1.0
    assert "pass@4" not in score_groups([group(0, None, ("1", 1.0))], Scoring(pass_at=(4,)))


def test_the_answer_is_taken_from_the_response_by_a_pattern():
    (rollout,) = group(0, ("42", 1.0)).rollouts
    assert Scoring().answer(rollout) == "42"
    assert Scoring(answer_key="other").answer(rollout) is None
    assert Scoring(answer_pattern=r"\((.*?)\)").answer(rollout) == "42x"  # the last match
    assert Scoring(answer_pattern=r"\(\w+\)").answer(rollout) == "(42x)"  # without a group all of it
    assert Scoring(answer_pattern=r"boxed\{(.*?)\}").answer(rollout) is None
