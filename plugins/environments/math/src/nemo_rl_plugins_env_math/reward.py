"""The same verification as a plain reward function."""

from __future__ import annotations

from nemo_rl_core.errors import DataError
from nemo_rl_plugins_env_math.scoring import score_math

__all__ = ["math_verify_reward"]


def math_verify_reward(
    response: str, answer: object = None, expected_answer: object = None, solution: object = None
) -> dict[str, float]:
    """1 if the response is mathematically equivalent to the row's answer, else 0, under the name `correct`.

    Args:
        response: What the policy said.
        answer: The expected answer, or
        expected_answer: the same under the name that NeMo Gym uses, or
        solution: a worked solution that ends in the answer.

    Raises:
        DataError: The row has none of the three columns.
        RewardError: The expected answer cannot be read as mathematics.
    """
    expected = next((value for value in (answer, expected_answer, solution) if value is not None), None)
    if expected is None:
        raise DataError(
            "The row has no column 'answer', 'expected_answer' or 'solution' to compare with. Map the column, as "
            "in `columns: {answer: <column>}`."
        )
    return {"correct": float(score_math(response, expected).correct)}
