"""A trained reward model as a reward, by name: `reward: {name: reward_model, options: {model: runs/rm/model}}`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from nemo_rl_plugins_reward_model.config import RewardModelRewardConfig
from nemo_rl_plugins_reward_model.scorer import RewardScorer, width_of

__all__ = ["RewardModelReward"]

_Waiting = tuple[list[int], "asyncio.Future[float]"]


class RewardModelReward:
    """Scores whole conversations; those that arrive together share forward passes.

    The first one waits `window_s` for others, and those that arrive during a pass go into the next. A pass runs in a
    thread, so rollouts go on meanwhile.

    Raises:
        ConfigError: The model cannot be loaded, or gives no score.
    """

    config_class: ClassVar[type] = RewardModelRewardConfig

    @staticmethod
    def example(folder: Path) -> Mapping[str, Any]:
        """What it can be checked with: a tiny model that was not trained."""
        import torch

        from nemo_rl_core.models import load_model, load_tokenizer

        load_model("scratch:qwen2-tiny", dtype=torch.float32, seed=3, head="scalar").save_pretrained(folder)
        load_tokenizer("scratch:qwen2-tiny").save_pretrained(folder)
        return {"model": str(folder), "max_sequence_length": 256}

    def __init__(self, config: RewardModelRewardConfig) -> None:
        self.config = config
        self._scorer = RewardScorer(config)
        self._waiting: list[_Waiting] = []
        self._drain_task: asyncio.Task[None] | None = None

    async def __call__(self, messages: Sequence[Mapping[str, Any]]) -> float:
        """The score of the conversation, the response being its last message."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[float] = loop.create_future()
        if self._drain_task is None or self._drain_task.done() or self._drain_task.get_loop() is not loop:
            self._waiting = []  # what a closed loop left behind nobody waits for
            self._drain_task = loop.create_task(self._drain())
        self._waiting.append((self._scorer.encode(messages), future))
        return await future

    async def _drain(self) -> None:
        """Score until nobody waits."""
        await asyncio.sleep(self.config.window_s)
        while batch := self._next_batch():
            try:
                scores = await asyncio.to_thread(self._scorer.score, [ids for ids, _ in batch])
            except Exception as error:  # told to each of those that wait
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), score in zip(batch, scores, strict=True):
                if not future.done():  # else its deadline has passed
                    future.set_result(score)

    def _next_batch(self) -> list[_Waiting]:
        """The longest waiting one and others of its width, as many as fit."""
        self._waiting = [entry for entry in self._waiting if not entry[1].done()]
        if not self._waiting:
            return []
        width = width_of(len(self._waiting[0][0]))
        batch = [entry for entry in self._waiting if width_of(len(entry[0])) == width][: self.config.batch_size]
        taken = {id(future) for _, future in batch}
        self._waiting = [entry for entry in self._waiting if id(entry[1]) not in taken]
        return batch

    def __getstate__(self) -> dict[str, Any]:
        """Its options alone: the copy in another process loads the model itself."""
        return {"config": self.config}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Load the model."""
        self.__init__(state["config"])  # type: ignore[misc]
