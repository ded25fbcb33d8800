"""The environment of every reasoning-gym task: one question, one response, the task's own score."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from attrs import field, frozen, validators

from nemo_rl_core.errors import DeadlineExceeded
from nemo_rl_core.protocols.environment import EnvironmentStep, SingleTurnEnvironment
from nemo_rl_core.records.message import Message, Task
from nemo_rl_plugins_env_reasoning_gym.scoring import Extraction, TaskScore, extract_answer, score_task

__all__ = ["ReasoningGymConfig", "ReasoningGymEnvironment"]

_log = logging.getLogger(__name__)


@frozen(kw_only=True)
class ReasoningGymConfig:
    """Options of the reasoning-gym environment."""

    extraction: Extraction = field(default="auto", validator=validators.in_(("auto", "tag", "boxed", "text")))
    r"""Where the answer stands: `tag`, `boxed`, `text` (all of it), or `auto`: the first of these that is there."""
    tag: str = "answer"
    """Name of the tag, as in `<answer>42</answer>`."""
    timeout_s: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    """Seconds for one score; then the worker is killed and the answer scores 0 (`env/timeout`).
    None is the run's `rollouts.reward_timeout_s`."""


class ReasoningGymEnvironment(SingleTurnEnvironment):
    """Scores a response by the scorer of the row's generator (`metadata.source_dataset`).

    The reward is named `score`, from 0 to 1, with partial credit for some tasks; the share of full scores is the
    metric `env/solved`. Scorers run in the process pool. What they raise over an answer
    scores 0 and is counted in `env/scorer_error`; a row without its generator's name is an error.
    """

    config_class: ClassVar[type] = ReasoningGymConfig
    example: ClassVar[Mapping[str, Any]] = {
        "task": {
            "prompt": "4 + 3 =",
            "question": "4 + 3 =",
            "answer": "7",
            "metadata": {"source_dataset": "chain_sum"},
        },
        "response": "<answer>7</answer>",
    }

    async def step(self, message: Message) -> EnvironmentStep:
        """Score the response and end the episode."""
        answer = extract_answer(message.get("content") or "", extraction=self.config.extraction, tag=self.config.tag)
        timed_out = False
        try:
            score = await self._scored(answer)
        except DeadlineExceeded:
            _log.warning("a reasoning-gym answer was not scored in time and scores 0")
            score, timed_out = TaskScore(score=0.0), True
        info: dict[str, Any] = {
            "extracted_answer": answer,
            "solved": float(score.score >= 1.0),
            "no_answer": float(not answer),
            "scorer_error": float(score.scorer_error is not None),
            "timeout": float(timed_out),
        }
        return EnvironmentStep(rewards={"score": score.score}, terminated=True, info=info)

    async def score(self, task: Task, response: str) -> float:
        """Score of one response to a task."""
        self.task = task
        answer = extract_answer(response, extraction=self.config.extraction, tag=self.config.tag)
        return (await self._scored(answer)).score

    async def _scored(self, answer: str | None) -> TaskScore:
        row = {name: self.task[name] for name in ("question", "answer", "metadata") if name in self.task}
        score: TaskScore = await self.context.run_in_pool(score_task, answer, row, timeout_s=self.config.timeout_s)
        return score
