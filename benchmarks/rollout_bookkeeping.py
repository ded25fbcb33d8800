"""Time the rollout engine takes for its own bookkeeping, per turn, with many episodes in flight.

The generator and the environment answer at once (after one trip through the event loop, so that all
episodes are really in flight together), so what is left is the engine: admission, seeds, deadlines,
records, garbage collection. Budget: 50 microseconds a turn at 10,000 episodes in flight. Beside it the
same with a real tokenizer and its chat template, a call in the process pool, and the making of a batch.
Times are wall clock; on a busy machine the CPU time of the loop's thread stands beside them.

    python benchmarks/rollout_bookkeeping.py [--episodes 10000] [--output benchmarks/results/rollout_bookkeeping.json]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from nemo_rl_core.data.message_log import ChatFormatter
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.models.tokenizer import Tokenizer
from nemo_rl_core.protocols.environment import EnvironmentStep
from nemo_rl_core.protocols.generation_backend import GenerationRequest, SamplingParams
from nemo_rl_core.records.completion import Completion
from nemo_rl_core.records.message import Message, Task
from nemo_rl_core.records.rollout import Rollout, RolloutGroup, Turn
from nemo_rl_core.records.to_batch import batch_from_groups
from nemo_rl_core.rollouts.engine import RolloutEngine
from nemo_rl_core.rollouts.runner import RolloutRunner
from nemo_rl_core.rollouts.scoring.process_pool import ProcessPool
from nemo_rl_core.schema import RolloutConfig

BUDGET_US = 50.0


class InstantGeneration:
    """Answers every request with the same tokens."""

    config_class: ClassVar[type] = dict
    capabilities: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        self.active = 0
        self.peak = 0

    async def generate(self, request: GenerationRequest) -> Completion:
        """Four tokens."""
        self.active += 1
        self.peak = max(self.peak, self.active)
        await asyncio.sleep(0)
        self.active -= 1
        return Completion(
            request_id=request.request_id,
            token_ids=[10, 11, 12, 1],
            logprobs=[-0.5, -0.25, -1.0, -0.125],
            finish_reason="stop",
            text="abc",
        )


class InstantEnvironment:
    """Ends after a number of turns; a reward at once."""

    config_class: ClassVar[type] = dict

    def __init__(self, num_turns: int) -> None:
        self.num_turns = num_turns
        self.turn = 0

    def reset(self, task: Task, seed: int) -> list[Message]:
        """The prompt."""
        return [{"role": "user", "content": task["prompt"]}]

    def step(self, message: Message) -> EnvironmentStep:
        """An answer, or the end."""
        self.turn += 1
        if self.turn == self.num_turns:
            return EnvironmentStep(rewards={"reward": 1.0}, terminated=True)
        return EnvironmentStep(messages=[{"role": "user", "content": "go on"}])

    def close(self) -> None:
        """Nothing is held."""


class InstantTokenizer:
    """One token a character, no template: so that only the engine is timed."""

    eos_token_id: int | None = 1
    pad_token_id: int | None = 1
    chat_template: str | None = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """One token a byte."""
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """One byte a token."""
        return bytes(token_ids).decode()

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """There is no template."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: Any) -> Any:
        """Nothing to save."""
        raise NotImplementedError


def measure_turns(tokenizer: Tokenizer, num_episodes: int, num_turns: int, group_size: int = 8) -> dict[str, float]:
    """Microseconds of one turn through a `RolloutRunner`, generator and environment instant."""
    generation = InstantGeneration()
    pool = ProcessPool(1, default_timeout_s=1.0)
    engine = RolloutEngine(
        generation=generation,
        environment=lambda context: InstantEnvironment(num_turns),
        chat=ChatFormatter(tokenizer),
        config=RolloutConfig(max_in_flight=num_episodes, max_turns=num_turns),
        sampling=SamplingParams(max_new_tokens=16),
        pool=pool,
        seed=0,
        max_sequence_length=4096,
    )

    async def run() -> tuple[float, float]:
        started = time.perf_counter()
        cpu = time.thread_time()
        groups = await asyncio.gather(
            *(
                engine.run_group(i, f"task-{i}", {"prompt": f"{i}+1"}, group_size=group_size, weight_version=0)
                for i in range(num_episodes // group_size)
            )
        )
        spent = time.perf_counter() - started, time.thread_time() - cpu
        assert all(len(group.valid) == group_size for group in groups)
        return spent

    gc.collect()
    runner = RolloutRunner(engine)
    seconds, cpu_seconds = runner.run(run()).result(timeout=600)
    runner.shutdown()
    pool.shutdown()
    turns = (num_episodes // group_size) * group_size * num_turns
    return {
        "us": seconds / turns * 1e6,
        "cpu_us": cpu_seconds / turns * 1e6,
        "peak_in_flight": generation.peak,
    }


def measure_pool(num_calls: int = 2000) -> dict[str, float]:
    """Microseconds of one call in a worker process: one after another, and many at once."""
    pool = ProcessPool(1, default_timeout_s=10.0)

    async def run() -> dict[str, float]:
        started = time.perf_counter()
        await pool.run(abs, -1)
        first = time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(num_calls):
            await pool.run(abs, -1)
        alone = time.perf_counter() - started
        started = time.perf_counter()
        await asyncio.gather(*(pool.run(abs, -1) for _ in range(num_calls)))
        together = time.perf_counter() - started
        return {
            "first_call_ms": first * 1e3,
            "us_per_call_alone": alone / num_calls * 1e6,
            "us_per_call_together": together / num_calls * 1e6,
        }

    try:
        return asyncio.run(run())
    finally:
        pool.shutdown()


def measure_batch(num_rollouts: int = 512, num_tokens: int = 1000) -> dict[str, float]:
    """Milliseconds to turn recorded rollouts into a training batch."""
    groups = [
        RolloutGroup(group_id=g, task_id=str(g), rollouts=[_rollout(g, i, num_tokens) for i in range(8)])
        for g in range(num_rollouts // 8)
    ]
    times = []
    for _ in range(5):
        started = time.perf_counter()
        batch = batch_from_groups(groups)
        times.append(time.perf_counter() - started)
    assert batch.num_tokens == num_rollouts * num_tokens
    return {"rollouts": num_rollouts, "tokens": batch.num_tokens, "ms": statistics.median(times) * 1e3}


def _rollout(group: int, index: int, num_tokens: int) -> Rollout:
    prompt: Message = {"role": "user", "content": "q"}
    answer: Message = {"role": "assistant", "content": "a"}
    sampled = num_tokens - num_tokens // 4
    turns = [
        Turn(message=prompt, token_ids=list(range(num_tokens // 4)), sampled=False),
        Turn(message=answer, token_ids=list(range(sampled)), sampled=True, logprobs=[-0.1 * i for i in range(sampled)]),
    ]
    return Rollout(
        rollout_id=f"{group}/{index}",
        task_id=str(group),
        index=index,
        seed=0,
        segments=[turns],
        rewards={"reward": 1.0},
    )


def main() -> None:
    """Measure, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "rollout_bookkeeping.json")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "machine": {"cpu_count": os.cpu_count(), "python": platform.python_version(), "load_1m": os.getloadavg()[0]},
        "budget_us_per_turn": BUDGET_US,
    }
    tokenizers = {"bookkeeping": InstantTokenizer(), "with_chat_template": load_tokenizer("scratch:qwen2-tiny")}
    for label, tokenizer in tokenizers.items():
        for num_turns in (1, 4):
            runs = [measure_turns(tokenizer, options.episodes, num_turns) for _ in range(options.repeats)]
            results[f"{label}_{num_turns}_turns"] = {
                "episodes_in_flight": int(runs[0]["peak_in_flight"]),
                "us_per_turn_median": statistics.median(r["us"] for r in runs),
                "us_per_turn_best": min(r["us"] for r in runs),
                "cpu_us_per_turn_median": statistics.median(r["cpu_us"] for r in runs),
            }
    results["process_pool"] = measure_pool()
    results["batch_from_groups"] = measure_batch()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
