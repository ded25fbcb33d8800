"""The math environment: one question, one response, 1 for an equivalent answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from attrs import field, frozen, validators

from nemo_rl_core.errors import DataError, DeadlineExceeded
from nemo_rl_core.protocols.environment import EnvironmentStep, SingleTurnEnvironment
from nemo_rl_core.records.message import Message, Task
from nemo_rl_plugins_env_math.scoring import MathScore, score_math

__all__ = ["MathConfig", "MathEnvironment"]

_log = logging.getLogger(__name__)


@frozen(kw_only=True)
class MathConfig:
    """Options of the math environment."""

    answer_columns: tuple[str, ...] = field(
        default=("answer", "expected_answer", "solution", "ground_truth"), validator=validators.min_len(1)
    )
    """Columns that may hold the expected answer; the first that the row has is used."""
    strict_boxed: bool = False
    r"""Only an answer in `\boxed{}` counts. Otherwise the last expression of the response may be taken."""
    timeout_s: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    """Seconds for one verification; then the worker is killed and the answer counts as wrong (`env/timeout`).
    None is the run's `rollouts.reward_timeout_s`."""
    max_characters: int | None = field(default=20_000, validator=validators.optional(validators.gt(0)))  # type: ignore[arg-type]
    """Only the end of a longer response is read; None reads all of it."""


class MathEnvironment(SingleTurnEnvironment):
    """Scores a response by mathematical equivalence with the row's answer (math-verify).

    The reward is named `correct` and is 1 or 0. An answer that cannot be verified in time counts as wrong and
    is counted in `env/timeout`; a row without a readable answer is an error of that rollout.
    """

    config_class: ClassVar[type] = MathConfig
    example: ClassVar[Mapping[str, Any]] = {
        "task": {"prompt": "What is 1/2 + 1/4?", "answer": "3/4"},
        "response": r"It is \boxed{0.75}.",
    }

    async def step(self, message: Message) -> EnvironmentStep:
        """Score the response and end the episode."""
        timed_out = False
        try:
            verdict = await self._verify(message.get("content") or "")
        except DeadlineExceeded:
            _log.warning("a math answer was not verified in time and counts as wrong")
            verdict, timed_out = MathScore(correct=False, extracted=None), True
        return EnvironmentStep(
            rewards={"correct": float(verdict.correct)},
            terminated=True,
            info={
                "extracted_answer": verdict.extracted,
                "no_answer": float(verdict.extracted is None and not timed_out),
                "timeout": float(timed_out),
            },
        )

    async def score(self, task: Task, response: str) -> float:
        """1.0 if the response is equivalent to the task's answer, else 0.0."""
        self.task = task
        return float((await self._verify(response)).correct)

    async def _verify(self, response: str) -> MathScore:
        expected = _expected(self.task, self.config.answer_columns)
        verdict: MathScore = await self.context.run_in_pool(
            score_math,
            response,
            expected,
            strict_boxed=self.config.strict_boxed,
            max_characters=self.config.max_characters,
            timeout_s=self.config.timeout_s,
        )
        return verdict


def _expected(task: Mapping[str, Any], columns: tuple[str, ...]) -> object:
    for name in columns:
        if task.get(name) is not None:
            return task[name]
    raise DataError(
        f"The row has no expected answer: none of {', '.join(map(repr, columns))} is in it. It has: "
        f"{', '.join(map(repr, task))}. Map the column, as in `columns: {{answer: <column>}}`."
    )
