"""Scores of several attempts at a prompt: pass@k and cons@k.

Legend: n attempts at a prompt, c of them correct, k of them looked at.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from math import comb, fsum
from typing import TYPE_CHECKING, Any

from attrs import frozen

from nemo_rl_core.errors import ConfigError

if TYPE_CHECKING:
    from nemo_rl_core.records.rollout import Rollout, RolloutGroup

__all__ = ["Scoring", "cons_at_k", "pass_at_k", "score_groups"]

_ROUNDING = 1e-9


def pass_at_k(num: int, num_correct: int, k: int) -> float:
    """Probability that k of n attempts, drawn without putting back, hold a correct one: 1 - C(n-c, k) / C(n, k).

    An unbiased estimate of the probability that k new attempts do (arXiv:2107.03374).

    Args:
        num: n.
        num_correct: c.
        k: From 1 to n.

    Raises:
        ConfigError: k is not from 1 to n, or c not from 0 to n.
    """
    _check_k(num, k, "pass@k")
    if not 0 <= num_correct <= num:
        raise ConfigError(f"pass@k: {num_correct} of {num} attempts cannot be correct.")
    return 1.0 - comb(num - num_correct, k) / comb(num, k)


def cons_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """Probability that the answer most frequent among k of n attempts, drawn without putting back, is correct.

    The exact mean over all C(n, k) choices. Where several answers are equally frequent, each wins with equal
    probability; attempts without an answer (None) do not vote, and a choice without any vote is wrong. Whether an
    answer is correct is the share of attempts with it that are.

    Args:
        answers: [n] what each attempt answered; equal ones vote together.
        correct: [n] whether each attempt is correct.
        k: From 1 to n.

    Raises:
        ConfigError: k is not from 1 to n.
    """
    num = len(answers)
    _check_k(num, k, "cons@k")
    votes: dict[Hashable, list[bool]] = defaultdict(list)
    for answer, is_correct in zip(answers, correct, strict=True):
        if answer is not None:
            votes[answer].append(is_correct)
    groups = [(len(rewards), sum(rewards) / len(rewards)) for rewards in votes.values()]
    silent = num - sum(count for count, _ in groups)
    wins = fsum(_wins(groups, silent, k, most) for most in range(1, min(k, max((c for c, _ in groups), default=0)) + 1))
    return wins / comb(num, k)


def _wins(groups: Sequence[tuple[int, float]], silent: int, k: int, most: int) -> float:
    """Choices of k in which the most frequent answer has `most` votes, each counted by how correct its winner is.

    Args:
        groups: Attempts with each answer, and the share of them that is correct.
        silent: Attempts without an answer.
        k: Attempts chosen.
        most: Votes of the winner.
    """
    # (chosen so far, answers with `most` votes) -> choices, and their sum of the correctness of those answers
    states: dict[tuple[int, int], tuple[int, float]] = {(0, 0): (1, 0.0)}
    for count, share in groups:
        grown: dict[tuple[int, int], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        for (chosen, tied), (ways, sums) in states.items():
            for taken in range(min(count, most, k - chosen) + 1):
                wins = taken == most
                key = (chosen + taken, tied + wins)
                choices = comb(count, taken)
                before = grown[key]
                grown[key] = (
                    before[0] + ways * choices,
                    before[1] + (sums + (share * ways if wins else 0.0)) * choices,
                )
        states = grown
    return fsum(sums / tied * comb(silent, k - chosen) for (chosen, tied), (_, sums) in states.items() if tied)


def _check_k(num: int, k: int, what: str) -> None:
    if not 1 <= k <= num:
        raise ConfigError(f"{what}: k={k} of {num} attempts is not available. Sample more, or take k from 1 to {num}.")


@frozen(kw_only=True)
class Scoring:
    """Settings for scoring rollouts."""

    pass_at: Sequence[int] = ()
    """Each k of pass@k."""
    cons_at: Sequence[int] = ()
    """Each k of cons@k."""
    correct_reward: float = 1.0
    """A rollout is correct if its reward is at least this."""
    answer_key: str = "extracted_answer"
    """Key of the answer in the environment's `info`."""
    answer_pattern: str | None = None
    """Regular expression that finds the answer in the response instead; its last match, of that the last group."""

    def is_correct(self, rollout: Rollout) -> bool:
        """Whether the rollout counts as correct."""
        return rollout.reward >= self.correct_reward - _ROUNDING

    def answer(self, rollout: Rollout) -> Hashable | None:
        """Return the answer of a rollout; None if it has none."""
        if self.answer_pattern is None:
            found = rollout.info.get(self.answer_key)
        else:
            matches = list(re.finditer(self.answer_pattern, rollout.response, re.DOTALL))
            found = matches[-1].group(matches[-1].re.groups) if matches else None
        return None if found is None else str(found).strip() or None


def score_groups(groups: Sequence[RolloutGroup], scoring: Scoring) -> dict[str, float]:
    """Metrics of these groups, over the rollouts that did not fail.

    Returns:
        `accuracy` (mean reward) and `num_prompts`; for each k `pass@<k>` and `cons@<k>`, means over the prompts that
        have at least k such rollouts; `num_short` if there are prompts with fewer than the largest k.
    """
    rollouts = [rollout for group in groups for rollout in group.valid]
    metrics: dict[str, float] = {"num_prompts": float(len(groups))}
    if rollouts:
        metrics["accuracy"] = fsum(rollout.reward for rollout in rollouts) / len(rollouts)
    for k in scoring.pass_at:
        scores = [_pass(group.valid, scoring, k) for group in groups if len(group.valid) >= k]
        metrics.update(_mean(f"pass@{k}", scores))
    for k in scoring.cons_at:
        scores = [_cons(group.valid, scoring, k) for group in groups if len(group.valid) >= k]
        metrics.update(_mean(f"cons@{k}", scores))
    largest = max((*scoring.pass_at, *scoring.cons_at), default=1)
    short = sum(len(group.valid) < largest for group in groups)
    return {**metrics, "num_short": float(short)} if short else metrics


def _pass(rollouts: Sequence[Rollout], scoring: Scoring, k: int) -> float:
    return pass_at_k(len(rollouts), sum(map(scoring.is_correct, rollouts)), k)


def _cons(rollouts: Sequence[Rollout], scoring: Scoring, k: int) -> float:
    return cons_at_k([scoring.answer(r) for r in rollouts], [scoring.is_correct(r) for r in rollouts], k)


def _mean(name: str, values: Sequence[float]) -> Mapping[str, Any]:
    return {name: fsum(values) / len(values)} if values else {}
