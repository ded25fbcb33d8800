"""Whether a response is mathematically equal to the expected answer.

Light to import: math-verify and sympy are imported by the process that scores. Equivalence can take for
ever (`9^{9^{9^9}}`), and math-verify's own time limit works by signals on a main thread only, so it is
switched off here: call these functions where they can be killed.
"""

from __future__ import annotations

import re

from attrs import frozen

from nemo_rl_core.errors import RewardError

__all__ = ["MathScore", "last_boxed", "score_math"]


@frozen(kw_only=True)
class MathScore:
    """Verdict on one response."""

    correct: bool
    extracted: str | None
    """What was taken for the answer; None if the response holds none."""


def score_math(
    response: str, expected: object, *, strict_boxed: bool = False, max_characters: int | None = None
) -> MathScore:
    r"""Compare the answer in a response with the expected one by math-verify.

    The expected answer is read as LaTeX; a worked solution is reduced to its last `\boxed{}` or to what
    follows `####`. The response is searched for expressions and LaTeX, as NeMo Gym's math_with_judge does.

    Args:
        response: What the policy said.
        expected: The expected answer, text or number.
        strict_boxed: Only the last `\boxed{}` of the response counts.
        max_characters: Read only the end of a longer response.

    Raises:
        RewardError: The expected answer is not mathematics that can be read: a mistake in the data.
    """
    _quiet()
    from math_verify import (
        ExprExtractionConfig,
        LatexExtractionConfig,
        parse,
        verify,
    )

    if max_characters is not None:
        response = response[-max_characters:]
    if strict_boxed:
        boxed = last_boxed(response)
        if boxed is None:
            return MathScore(correct=False, extracted=None)
        response = boxed
    gold = parse(_gold(expected), [LatexExtractionConfig()], parsing_timeout=None)
    if not gold:
        raise RewardError(
            f"The expected answer {str(expected)[:200]!r} cannot be read as mathematics. Correct the data, or set "
            "`answer_columns` to the column that holds the answer."
        )
    answer = parse(response, [ExprExtractionConfig(), LatexExtractionConfig()], parsing_timeout=None)
    if not answer:
        return MathScore(correct=False, extracted=None)
    return MathScore(correct=bool(verify(gold, answer, timeout_seconds=None)), extracted=str(answer[-1]))


def last_boxed(text: str) -> str | None:
    r"""The last `\boxed{...}` of a text with its braces balanced, or None."""
    for match in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth = 0
        for end in range(match.end() - 1, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.start() : end + 1]
    return None


def _gold(expected: object) -> str:
    text = str(expected).strip()
    if "####" in text:
        text = text.rsplit("####", 1)[1].strip()
    return last_boxed(text) or f"\\boxed{{{text}}}"


def _quiet() -> None:
    """math-verify warns once per process that its time limit is off, which is meant."""
    from math_verify import grader, parser

    grader.TIMEOUT_WARNING_SHOWN = parser.TIMEOUT_WARNING_SHOWN = True
