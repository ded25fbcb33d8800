"""Scores of answers by reasoning-gym's own scorers. Light to import; reasoning-gym is imported by the worker."""

from __future__ import annotations

import decimal
import logging
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal

from attrs import frozen

from nemo_rl_core.errors import DataError

__all__ = ["Extraction", "TaskScore", "extract_answer", "score_task"]

_log = logging.getLogger(__name__)

Extraction = Literal["auto", "tag", "boxed", "text"]
r"""auto: the last tag, else the last `\boxed{}`, else the whole text; the others take only what they name."""


@frozen(kw_only=True)
class TaskScore:
    """Score of one answer."""

    score: float
    """0 to 1; reasoning-gym gives partial credit for some tasks."""
    scorer_error: str | None = None
    """What the scorer raised over this answer, which then scores 0."""


def extract_answer(response: str, *, extraction: Extraction = "auto", tag: str = "answer") -> str | None:
    r"""The answer in a response, without the space around it; None if it is not there.

    Departs from NeMo Gym in one thing: a whole text is stripped as well.
    """
    if extraction in ("auto", "tag"):
        name = re.escape(tag)
        matches = re.findall(rf"<{name}>(.*?)</{name}>", response, flags=re.DOTALL)
        if matches or extraction == "tag":
            return matches[-1].strip() if matches else None
    if extraction in ("auto", "boxed"):
        boxed = _last_boxed(response)
        if boxed is not None or extraction == "boxed":
            return boxed
    return response.strip()


def score_task(answer: str | None, row: Mapping[str, Any]) -> TaskScore:
    """Score an answer to a row by the scorer of the generator that made the row.

    Args:
        answer: The extracted answer; None scores 0.
        row: With `question`, `answer` and `metadata.source_dataset`.

    Raises:
        DataError: The row does not say which generator made it, or that is unknown.
    """
    metadata = row.get("metadata")
    name = metadata.get("source_dataset") if isinstance(metadata, Mapping) else None
    if not name:
        raise DataError(
            "The row has no `metadata.source_dataset`, which names the reasoning-gym task that scores it. It has: "
            f"{', '.join(map(repr, row))}."
        )
    scorer = _scorer(str(name))
    if answer is None:
        return TaskScore(score=0.0)
    try:
        with decimal.localcontext(decimal.DefaultContext):  # some tasks change the precision of the process
            return TaskScore(score=float(scorer(answer, dict(row))))
    except Exception as e:  # scorers parse what a model wrote, and some trip over nonsense
        _log.info("the scorer of %s raised over an answer, which scores 0: %r", name, e)
        return TaskScore(score=0.0, scorer_error=f"{type(e).__name__}: {e}"[:200])


@cache
def _scorer(name: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym import factory

    if name not in factory.DATASETS:
        raise DataError(
            f"`metadata.source_dataset` is {name!r}, which this reasoning-gym does not have. Install the version that "
            "made the rows."
        )
    scorer: Callable[[str, dict[str, Any]], float] = factory.get_score_answer_fn(name)
    return scorer


def _last_boxed(text: str) -> str | None:
    for match in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth = 0
        for end in range(match.end() - 1, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() : end].strip()
    return None
